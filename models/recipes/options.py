"""Options, output and errors that the commands of all recipes share."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import click
import torch

from isthmus.models.bundle.files import check_replaceable
from isthmus.models.errors import IsthmusError
from isthmus.models.recipes.common.trainer import Run
from isthmus.models.vision.bundle import Bundle

LEAST_SIDE, MOST_SIDE = 16, 1024  # pixels of a network's input

Command = Callable[..., Any]
manifest_as_json = click.option("--json", "as_json", is_flag=True, help="Print the finished manifest as JSON.")


def check_out(context: click.Context, parameter: click.Parameter, value: Path) -> Path:
    try:
        check_replaceable(value)
    except IsthmusError as error:
        raise click.BadParameter(str(error)) from error
    return value


def out_option(default: str | None = None) -> Callable[[Command], Command]:
    """`--out`, the folder of the bundle; a folder that may not be replaced is refused before anything is trained."""
    return click.option(
        "--out",
        type=click.Path(path_type=Path),
        default=default,
        required=default is None,
        show_default=True,
        callback=check_out,
        help="Folder of the bundle: absent, empty, or a bundle, which is replaced.",
    )


class Size(click.ParamType):  # type: ignore[type-arg]  # not generic in older versions of click
    """Pixels of a square's side, or HEIGHTxWIDTH."""

    name = "size"

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> tuple[int, int]:
        if isinstance(value, tuple):
            return value
        sides = value.lower().split("x")
        if len(sides) > 2 or not all(side.isdecimal() and LEAST_SIDE <= int(side) <= MOST_SIDE for side in sides):
            self.fail(f"{value!r}: expected pixels from {LEAST_SIDE} to {MOST_SIDE}, as 224, or 192x256 for H x W")
        return int(sides[0]), int(sides[-1])


def use_threads(context: click.Context, parameter: click.Parameter, value: int) -> None:
    if value:
        torch.set_num_threads(value)


def training_options(work: str, *, apart: bool = True) -> Callable[[Command], Command]:
    """Options of every recipe: the folder of checkpoints, seed and threads, of which the first two make its `run`.

    apart: by default checkpoints are in a folder of `work` that is named after what they are made from.
    """
    folder, default = Path(work), f"{work}, a folder for each model, data and options" if apart else work
    options = (
        click.option("--work", type=click.Path(path_type=Path), help=f"Checkpoints.  [default: {default}]"),
        click.option("--seed", default=0, show_default=True),
        click.option(
            "--threads",
            default=0,
            show_default=True,
            expose_value=False,
            callback=use_threads,
            help="PyTorch threads; 0 for every core.",
        ),
    )

    def add(command: Command) -> Command:
        @wraps(command)
        def with_run(*arguments: Any, work: Path | None, seed: int, **others: Any) -> Any:
            run = Run(work or folder, seed, apart=apart and work is None)
            return command(*arguments, run=run, **others)

        decorated: Command = with_run
        for option in reversed(options):
            decorated = option(decorated)
        return decorated

    return add


def report(out: Path, bundle: Bundle, as_json: bool) -> None:
    """Print the fingerprint and the scores of a bundle, or its manifest as JSON."""
    if as_json:
        click.echo(bundle.manifest.model_dump_json(indent=1, exclude_none=True))
        return
    click.echo(f"wrote {out}: {bundle.manifest.fingerprint}")
    for name, score in bundle.manifest.scores.items():
        click.echo(f"{name:<24} {score.value:.4f} [{score.low:.4f}, {score.high:.4f}] n={score.samples}")


@contextmanager
def failing_clearly(work: Path) -> Iterator[None]:
    """Exit with one line and a non-zero code on errors and interruptions."""
    try:
        yield
    except KeyboardInterrupt:
        click.echo(f"interrupted; the same command resumes from {work}", err=True)
        sys.exit(130)
    except (IsthmusError, OSError) as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(1)
