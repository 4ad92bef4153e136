"""`edge-agent explain`: why photos are answered as they are, with every way that was considered."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from isthmus.edge_agent.cli.photos import answer_files, open_photos
from isthmus.edge_agent.cli.settings import settings
from isthmus.models.options import Command

if TYPE_CHECKING:
    from isthmus.edge_agent.policy.exits import Candidate
    from isthmus.edge_agent.vision.result import Answer

EXAMPLES = """\b
Examples:
  edge-agent explain photo.jpg --cloud cloud:50051
  edge-agent explain photo.jpg --cloud cloud:50051 --objective greenest --profile lte
  edge-agent explain photo.jpg --cloud cloud:50051 --json"""
HEADER = ("", "way", "ms", "bytes", "µ$", "mJ modelled", "calls", "agreement", "right", "")
UNKNOWN = "-"


@click.command(cls=Command, epilog=EXAMPLES)
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a line.")
@click.option("--private", is_flag=True, help="Nothing of the photos leaves the device.")
@settings("Cloud and device", "Photos")
def explain(files: tuple[Path, ...], as_json: bool, private: bool) -> None:
    """Say why photos are answered as they are.

    FILES are JPEG, PNG, WebP, HEIC, AVIF, TIFF, BMP or GIF. Each is answered as by `edge-agent infer`. The table
    lists every way that was considered at the last step, marks the chosen one with >, and says which constraint
    excludes others.

    Columns: predicted latency with its standard deviation, bytes both ways, money, energy by the profile's model,
    calls of the cloud, agreement with the cloud's model, and chance of being right.
    """
    agent = open_photos()
    from isthmus.edge_agent.vision.result import format_answer

    with agent:
        ask = partial(agent.infer, private=private, explain=True)
        answer_files(files, ask, as_json, lambda file, answer: [*format_answer(str(file), answer)[:2], *table(answer)])


def table(answer: Answer) -> list[str]:
    """The candidates in columns, and what the answer really took."""
    rows = [HEADER, *map(row, answer.candidates or ())]
    widths = [max(len(cells[column]) for cells in rows) for column in range(len(HEADER))]
    lines = [aligned(cells, widths) for cells in rows]
    measured = (
        f"    took {answer.stage_ms['total']:.1f} ms, {answer.bytes_up} B up, {answer.bytes_down} B down, "
        f"{1e6 * answer.cost_usd:.2f} µ$, {1000 * answer.modelled_joules:.1f} mJ by the model"
    )
    return [*lines, measured]


def aligned(cells: Sequence[str], widths: Sequence[int]) -> str:
    """Text to the left, numbers to the right."""
    left = (0, 1, len(cells) - 1)
    padded = [
        cell.ljust(width) if column in left else cell.rjust(width)
        for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
    ]
    return ("    " + "  ".join(padded)).rstrip()


def row(each: Candidate) -> tuple[str, ...]:
    """The cells of one way."""
    return (
        ">" if each.chosen else "",
        each.name,
        f"{1000 * each.seconds:.1f} ± {1000 * each.spread_s:.1f}",
        f"{each.bytes:.0f}",
        f"{1e6 * each.usd:.2f}",
        f"{1000 * each.joules:.1f}",
        f"{each.calls:.2g}",
        share(each.agreement),
        share(each.right),
        each.excluded or "",
    )


def share(value: float | None) -> str:
    """A share in percent; a dash where nothing is known."""
    return UNKNOWN if value is None else f"{value:.1%}"
