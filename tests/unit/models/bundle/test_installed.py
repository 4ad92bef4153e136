from __future__ import annotations

from pathlib import Path

import pytest

from isthmus.models.bundle.installed import NAME, SHIPPED, find, find_all, folders, missing, user_folder


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, home and data folder."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.delenv(NAME, raising=False)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path


def test_a_name_is_looked_for_in_the_named_the_users_and_the_shipped_folder(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert find(Path("fashion")) == SHIPPED / "fashion"
    (user_folder() / "fashion").mkdir(parents=True)
    assert find(Path("fashion")) == home / "data/isthmus/bundles/fashion"
    (home / "own/fashion").mkdir(parents=True)
    monkeypatch.setenv(NAME, str(home / "own"))
    assert find(Path("fashion")) == home / "own/fashion"
    (home / "work/fashion").mkdir()
    assert find(Path("fashion")) == Path("fashion")
    assert find_all([Path("fashion"), Path("elpv")]) == (Path("fashion"), SHIPPED / "elpv")


def test_an_address_is_no_folder(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(NAME, "https://example.org/bundles")
    assert folders() == (user_folder(), SHIPPED)


def test_by_default_bundles_are_kept_below_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    assert user_folder() == Path.home() / ".local/share/isthmus/bundles"


@pytest.mark.parametrize("path", ["/nowhere", "a/b", "..", ".", "../fashion", "nothing"])
def test_a_path_stays_as_it_is(home: Path, path: str) -> None:
    assert find(Path(path)) == Path(path)


def test_a_name_that_is_nowhere_is_said_so(home: Path) -> None:
    assert "no bundle 'nothing' in ., " in str(missing(Path("nothing")))
    assert missing(Path("/nowhere/nothing")) is None
    assert missing(SHIPPED / "fashion") is None
