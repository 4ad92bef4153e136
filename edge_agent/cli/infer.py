"""`edge-agent infer`: answer photos from files."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from isthmus.edge_agent.cli.photos import answer_files, open_photos
from isthmus.edge_agent.cli.settings import settings
from isthmus.models.errors import InvalidInput
from isthmus.models.options import Command

if TYPE_CHECKING:
    from isthmus.edge_agent.vision.result import Answer

PROGRESS_FROM = 10  # photos; fewer are done before a bar could be read
EXAMPLES = """\b
Examples:
  edge-agent infer photo.jpg
  edge-agent infer *.jpg --cloud cloud:50051 --json
  edge-agent infer photo.jpg --cloud cloud:50051 --rate 2
  edge-agent infer *.jpg --plot drawn"""


@click.command(cls=Command, epilog=EXAMPLES)
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a line.")
@click.option("--tap", help="Bottleneck to send, by name. Of tap, width and rate the router chooses what is not named.")
@click.option("--width", type=click.FloatRange(0, 1), help="Width of the encoder, as a share of its channels.")
@click.option("--rate", type=click.IntRange(0), help="Rate of the bottleneck; 0 is the smallest.")
@click.option("--private", is_flag=True, help="Nothing of the photos leaves the device.")
@click.option(
    "--plot",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder for copies of the photos, as PNG, with the answers drawn on them.",
)
@settings("Cloud and device", "Photos")
def infer(
    files: tuple[Path, ...],
    as_json: bool,
    tap: str | None,
    width: float | None,
    rate: int | None,
    private: bool,
    plot: Path | None,
) -> None:
    """Answer photos from files.

    FILES are JPEG, PNG, WebP, HEIC, AVIF, TIFF, BMP or GIF. Each answer says what was found, where it was made, how
    long that took, and why. Without --cloud the device answers alone. An answer that it gives in place of a cloud that
    is late or unreachable is marked DEGRADED.
    """
    agent = open_photos()
    from isthmus.edge_agent.vision.result import format_answer

    with agent:
        ask: Callable[[Path], Answer] = partial(agent.infer, tap=tap, width=width, rate=rate, private=private)
        if plot:
            plot.mkdir(parents=True, exist_ok=True)
            ask = partial(plotted, ask, plot)
        answer_files(progress(files), ask, as_json, lambda file, answer: format_answer(str(file), answer))


def plotted(ask: Callable[[Path], Answer], folder: Path, file: Path) -> Answer:
    """The answer to a file, and a copy with it in `folder`. Raises InvalidInput where that cannot be written."""
    answer, target = ask(file), folder / f"{file.name}.png"
    try:
        answer.plot(file).save(target)
    except OSError as error:
        raise InvalidInput(f"{target} cannot be written: {error.strerror or error}") from error
    return answer


def progress(files: Sequence[Path]) -> Iterable[Path]:
    """A bar on a terminal's standard error when there are many photos."""
    if len(files) < PROGRESS_FROM or not sys.stderr.isatty():
        return files
    from rich.console import Console
    from rich.progress import track

    return track(files, "photos", console=Console(stderr=True))
