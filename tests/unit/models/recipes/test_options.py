from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from click.testing import CliRunner

from isthmus.models.errors import InvalidInput
from isthmus.models.recipes.common.trainer import Run
from isthmus.models.recipes.options import Size, failing_clearly, report, training_options
from isthmus.models.vision.bundle import Bundle


@click.command()
@training_options("runs/x")
def command(run: Run) -> None:
    click.echo(json.dumps([str(run.folder), run.seed, run.apart, torch.get_num_threads()]))


def found(*words: str) -> Any:
    return json.loads(CliRunner().invoke(command, words).stdout)


def test_every_recipe_has_work_and_seed() -> None:
    assert found()[:3] == ["runs/x", 0, True]  # a folder in there for each origin
    assert found("--work", "mine", "--seed", "3")[:3] == ["mine", 3, False]


def test_threads_are_pytorchs() -> None:
    before = torch.get_num_threads()
    try:
        assert found("--threads", "1")[3] == 1
    finally:
        torch.set_num_threads(before)


def test_a_report_names_fingerprint_and_scores(tiny_bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    report(Path("zoo/tiny"), tiny_bundle, as_json=False)
    shown = capsys.readouterr().out
    assert shown.startswith(f"wrote zoo/tiny: {tiny_bundle.manifest.fingerprint}\n")
    assert "test cloud accuracy" in shown and "0.7500 [0.5000, 0.9000] n=20" in shown


def test_a_report_as_json_is_the_manifest(tiny_bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    report(Path("zoo/tiny"), tiny_bundle, as_json=True)
    assert json.loads(capsys.readouterr().out)["fingerprint"] == tiny_bundle.manifest.fingerprint


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (InvalidInput("no"), 1, "error: no\n"),
        (OSError("disk full"), 1, "error: disk full\n"),
        (KeyboardInterrupt(), 130, "interrupted; the same command resumes from runs/x\n"),
    ],
)
def test_errors_end_with_one_line(
    capsys: pytest.CaptureFixture[str], error: BaseException, code: int, words: str
) -> None:
    with pytest.raises(SystemExit) as caught, failing_clearly(Path("runs/x")):
        raise error
    assert (caught.value.code, capsys.readouterr().err) == (code, words)


def test_other_errors_are_not_hidden() -> None:
    with pytest.raises(ZeroDivisionError), failing_clearly(Path("runs/x")):
        raise ZeroDivisionError


@pytest.mark.parametrize(("text", "size"), [("224", (224, 224)), ("192x256", (192, 256)), ("192X16", (192, 16))])
def test_a_size_is_a_side_or_two(text: str, size: tuple[int, int]) -> None:
    assert Size().convert(text, None, None) == size


@pytest.mark.parametrize("text", ["", "15", "1025", "1x2x3", "224x", "-224", "2e2"])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(click.UsageError, match="expected pixels from 16 to 1024, as 224, or 192x256"):
        Size().convert(text, None, None)
