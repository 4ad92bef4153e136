from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from isthmus.models.errors import InvalidInput
from isthmus.models.recipes.__main__ import main
from isthmus.models.recipes.common.trainer import Run
from isthmus.models.recipes.vision import elpv
from isthmus.models.recipes.vision.baselines import settings_of


@pytest.mark.parametrize("words", [["--help"], ["elpv", "--help"], ["baselines", "--help"]])
def test_help_has_an_example(words: list[str]) -> None:
    assert "Example: python -m isthmus.models.recipes " in CliRunner().invoke(main, words).stdout


@pytest.mark.parametrize(
    "words",
    [
        ["elpv"],
        ["fashion"],
        ["photos", "--labelled", "."],
        ["language", "--prompts", "photos/a.jpg"],
        ["split", "--model", "nets:make", "--data", "photos"],
    ],
    ids=lambda words: words[0],
)
def test_every_recipe_refuses_to_replace_what_is_no_bundle_before_it_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(b"mine")
    done = CliRunner().invoke(main, [*words, "--out", "photos"])
    assert done.exit_code == 2
    assert "photos is neither empty nor a bundle: it holds a.jpg; only a bundle is replaced" in done.stderr
    assert [path.name for path in tmp_path.rglob("*")] == ["photos", "a.jpg"]


def test_baselines_of_an_unknown_name_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def train(bundle: Path, run: Run, methods: tuple[str, ...]) -> None:
        settings_of(methods[0])

    monkeypatch.setattr(elpv, "train_baselines", train)
    done = CliRunner().invoke(main, ["baselines", "n7", "--work", str(tmp_path)])
    assert done.exit_code == 1
    assert done.stderr.startswith("error: method 'n7' is unknown, expected one of entropic-student")


def test_figures_of_the_last_epochs_come_as_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elpv, "train_baselines", lambda *_: {"n0": {"loss": 1.5}})
    done = CliRunner().invoke(main, ["baselines", "n0", "--work", str(tmp_path), "--json"])
    assert json.loads(done.stdout) == {"n0": {"loss": 1.5}}


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [(KeyboardInterrupt(), 130, "the same command resumes"), (InvalidInput("no"), 1, "error: no\n")],
)
def test_a_run_that_ends_early_says_so_in_one_line(
    monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, words: str
) -> None:
    def make(*_: object) -> None:
        raise error

    monkeypatch.setattr(elpv, "make", make)
    done = CliRunner().invoke(main, ["elpv"])
    assert done.exit_code == code
    assert words in done.stderr
    assert done.stderr.count("\n") == 1
