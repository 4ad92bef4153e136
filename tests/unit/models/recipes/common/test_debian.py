from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from isthmus.models.errors import InvalidInput
from isthmus.models.recipes.common import debian


def test_a_package_is_unpacked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    def run(command: Sequence[str], folder: Path) -> None:
        ran.append(command[0])
        name = {"apt-get": "data_1_all.deb", "dpkg-deb": "photo.jpg"}[command[0]]
        (folder / name).write_bytes(b"")

    monkeypatch.setattr(debian, "run", run)
    for _ in range(2):
        assert debian.fetch("data", tmp_path) == tmp_path / "data"
        assert [path.name for path in (tmp_path / "data").iterdir()] == ["photo.jpg"]
    assert ran == ["apt-get", "dpkg-deb"]


@pytest.mark.parametrize("error", [FileNotFoundError("apt-get"), subprocess.CalledProcessError(100, "apt-get"), None])
def test_a_package_that_cannot_be_had_is_named_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception | None
) -> None:
    def run(command: Sequence[str], folder: Path) -> None:
        if error:  # else: it ends well, and nothing was downloaded
            raise error

    monkeypatch.setattr(debian, "run", run)
    with pytest.raises(InvalidInput, match="the Debian package data cannot be fetched"):
        debian.fetch("data", tmp_path)
    assert not (tmp_path / "data").exists()
