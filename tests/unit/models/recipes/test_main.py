from __future__ import annotations

import pytest
from click.testing import CliRunner

from models.errors import InvalidInput
from models.recipes import elpv
from models.recipes.__main__ import main


@pytest.mark.parametrize("words", [["--help"], ["elpv", "--help"]])
def test_help_has_an_example(words: list[str]) -> None:
    assert "Example: python -m models.recipes elpv" in CliRunner().invoke(main, words).stdout


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [(KeyboardInterrupt(), 130, "the same command goes on"), (InvalidInput("no"), 1, "error: no\n")],
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
