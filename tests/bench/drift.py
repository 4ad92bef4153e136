"""How soon the drift gate alarms after photos shift, and how often without a shift.

    photos of the test part, as they are and corrupted -> first segment -> statistics, computed once
                                                       -> streams drawn at random -> policy.drift, many at once

Photos are drawn with replacement, so that a stream is exchangeable up to its shift; a camera's frames are not.
"""

from __future__ import annotations

import copy
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.progress import track

from isthmus.edge_agent.policy.drift import FIRST, DriftGate, statistics
from isthmus.edge_agent.vision.exit_rule import exit_rule
from isthmus.models.bundle.installed import find
from isthmus.models.errors import IsthmusError
from isthmus.models.recipes.common.intervals import interval
from isthmus.models.vision.bundle import Bundle
from isthmus.models.vision.head import Head
from isthmus.models.vision.images import preprocess
from tests.bench.audit_recording import AS_IS, corrupted, kinds, photos_for

BEFORE = (500, 3000)  # inputs before the shift
WITHIN, UNSHIFTED = 300, 20_000  # inputs after it, and of a stream without one
Floats = NDArray[np.float32]
Row = dict[str, Any]


def statistics_of(bundle: Bundle, photos: list[Image.Image], kind: str) -> Floats:
    """(N, K), of every photo of one kind."""
    head, rule = Head(bundle, 1), exit_rule(bundle.manifest.heads["fp32"], 0.0)
    random, rows = np.random.default_rng(0), []
    for photo in track(photos, kind, console=Console(stderr=True), transient=True):
        features_CHW, exit_K = head.segment(
            0, preprocess(corrupted(photo, kind, random), bundle.manifest.preprocessing)
        )
        rows.append(statistics(features_CHW, rule.score([exit_K])))
    return np.array(rows, np.float32)


def recorded(bundle: Bundle, file: Path, data: Path, count: int) -> dict[str, Floats]:
    """Every kind, from `file` where it is there; else computed and kept there."""
    if not file.exists():
        photos = photos_for(bundle, data, count)
        file.parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(file, **{kind: statistics_of(bundle, photos, kind) for kind in kinds()})  # type: ignore[arg-type]
    with np.load(file, allow_pickle=False) as arrays:
        return dict(arrays)


def alarms(
    gate: DriftGate, rows_NK: Floats, streams: int, inputs: int, random: np.random.Generator
) -> NDArray[np.int64]:
    """Of each stream, the number of inputs until its alarm; 0 without one."""
    alarm_R = np.zeros(streams, np.int64)
    for at in range(1, inputs + 1):
        gate.observe(rows_NK[random.integers(len(rows_NK), size=streams)])
        alarm_R[(alarm_R == 0) & gate.alarm] = at
        if alarm_R.all():
            break
    return alarm_R


def measure(rows: dict[str, Floats], streams: int, unshifted: int) -> Row:
    """All figures of one bundle."""
    random, gate, shifts = np.random.default_rng(0), DriftGate(), dict[str, Row]()
    begun = alarms(gate, rows[AS_IS], streams, FIRST + BEFORE[0], random) > 0
    for before, more in zip(BEFORE, (*np.diff(BEFORE), unshifted - BEFORE[-1]), strict=True):
        for kind in (kind for kind in rows if kind != AS_IS):
            delay_R = alarms(copy.deepcopy(gate), rows[kind], streams, WITHIN, random)[~begun]
            seen = delay_R[delay_R > 0]
            shifts[f"{kind}, after {before}"] = {
                "alarmed": interval(delay_R > 0).model_dump(),
                "median_delay": float(np.median(seen)) if seen.size else None,
            }
        begun |= alarms(gate, rows[AS_IS], streams, int(more), random) > 0
    false = interval(begun).model_dump()
    return {
        "photos": len(rows[AS_IS]),
        "streams": streams,
        "inputs": unshifted,
        "false_alarms": false,
        "shifts": shifts,
    }


def percent(share: Row) -> str:
    """With its interval."""
    return f"{share['value']:.1%} [{share['low']:.1%}, {share['high']:.1%}]"


def table(row: Row) -> str:
    """Markdown."""
    lines = [
        f"{row['photos']} photos; without a shift {percent(row['false_alarms'])} of {row['streams']} streams of"
        f" {row['inputs']} inputs alarm",
        "",
        f"| shift | alarm within {WITHIN} inputs | median delay |",
        "|---|---:|---:|",
    ]
    for kind, each in row["shifts"].items():
        delay = "-" if each["median_delay"] is None else f"{each['median_delay']:.0f}"
        lines.append(f"| {kind} | {percent(each['alarmed'])} | {delay} |")
    return "\n".join(lines)


@click.command(epilog="Example: python -m tests.bench.drift --json runs/drift.json")
@click.option("--bundle", "bundles", multiple=True, default=("fashion", "elpv"), show_default=True)
@click.option("--recordings", default="runs/drift", show_default=True, type=click.Path(path_type=Path))
@click.option("--data", default="runs/fashion/data", show_default=True, type=click.Path(path_type=Path))
@click.option("--photos", default=4000, show_default=True, type=click.IntRange(10), help="Photos at most, a bundle.")
@click.option("--streams", default=300, show_default=True, type=click.IntRange(1))
@click.option("--inputs", default=UNSHIFTED, show_default=True, type=click.IntRange(BEFORE[-1] + 1))
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write all figures here.")
def main(
    bundles: tuple[str, ...], recordings: Path, data: Path, photos: int, streams: int, inputs: int,
    json_path: Path | None,
) -> None:  # fmt: skip
    """Measure the drift gate's alarms; print Markdown tables."""
    result: Row = {"machine": f"{platform.machine()}, {os.cpu_count()} cores"}
    try:
        for name in bundles:
            rows = recorded(Bundle.open(find(Path(name))), recordings / f"{name}.npz", data, photos)
            result[name] = measure(rows, streams, inputs)
            click.echo(f"## {name}\n\n{table(result[name])}\n")
    except (IsthmusError, OSError) as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(1)
    if json_path:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        click.echo(f"figures: {json_path}")


if __name__ == "__main__":
    main()
