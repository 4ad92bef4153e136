"""The three figures of the SC2 benchmark for every method: encoder size, bytes a photo, accuracy.

On the test photos of a bundle (by default ELPV's test part): image codecs into the cloud model, bottlenecks of other
papers trained on the same photos, and every tap, width and rate of the bundle. Each photo passes one by one through
encoder, real bytes, decoder and tail, by default on one thread. Measurements are stored under `--work`, and an
interrupted run resumes from them.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress

from isthmus.models.errors import IsthmusError
from isthmus.models.vision.bundle import Bundle
from isthmus.models.vision.head import Head
from isthmus.models.vision.tail import open_tail
from tests.bench.processes import ROOT
from tests.bench.sc2_figures import compare
from tests.bench.sc2_measure import Bench, Measured
from tests.bench.sc2_photos import labelled_option, photos_of
from tests.bench.sc2_report import plot, table
from tests.bench.sc2_ways import METHODS, Way, lossless, trained_for, training_command, ways

Row = dict[str, Any]


def sc2(
    folder: Path,
    labelled: Path | None,
    work: Path,
    methods: tuple[str, ...] | None,
    count: int | None,
    threads: int,
    resamples: int,
) -> Row:
    """The whole comparison as the JSON that `--json` writes."""
    torch.set_num_threads(threads)
    bundle = Bundle.open(folder)
    tail = open_tail(bundle)
    photos = photos_of(bundle.manifest.tasks[0].name, labelled)
    todo = ways(bundle, Head(bundle, threads), tail, work, methods)
    chosen = np.random.default_rng(0).permutation(len(photos.labels_N))[:count]
    bench = Bench(
        [photos.image(index) for index in chosen], bundle.manifest.preprocessing, bundle.fingerprint, work / "measured"
    )
    cloud, *measured = run(bench, [lossless(bundle, tail), *todo])
    results: dict[str, list[tuple[Way, Measured]]] = {}
    for way, columns in zip(todo, measured, strict=True):
        results.setdefault(way.method, []).append((way, columns))
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {threads} used",
        "bundle": bundle.manifest.fingerprint,
        "left_out": [m for m in trained_for(bundle) if methods is None and m not in results],
        **compare(results, cloud, photos.labels_N[chosen], resamples),
    }


def run(bench: Bench, todo: list[Way]) -> list[Measured]:
    """Measure every method at every setting, one after another."""
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=len(todo) * len(bench.images))
        measured = []
        for way in todo:
            bar.update(task, description=f"{way.method} {way.setting}")
            measured.append(bench.measure(way, lambda: bar.advance(task)))
        return measured


def parse_methods(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[str, ...] | None:
    if value is None:
        return None
    names = tuple(name.strip() for name in value.split(",") if name.strip())
    if unknown := [name for name in names if name not in METHODS] or (not names and ["nothing"]):
        raise click.BadParameter(f"{', '.join(unknown)} unknown, choose among {', '.join(METHODS)}")
    return names


@click.command(epilog="Example: python -m tests.bench.sc2 --methods ours,jpeg,webp --json runs/sc2.json")
@click.option("--bundle", default=ROOT / "models" / "zoo" / "elpv", type=click.Path(path_type=Path))
@labelled_option
@click.option(
    "--work",
    default=Path("runs/sc2"),
    show_default=True,
    type=click.Path(path_type=Path),
    help="Trained runs and measurements.",
)
@click.option("--methods", callback=parse_methods, help=f"Of {', '.join(METHODS)}; default: all that are ready.")
@click.option("--photos", type=click.IntRange(2), help="Number of test photos.  [default: all]")
@click.option("--threads", default=1, show_default=True, type=click.IntRange(1))
@click.option("--resamples", default=2000, show_default=True, type=click.IntRange(100), help="Bootstrap resamples.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write all figures here.")
@click.option("--plot", "plot_path", type=click.Path(path_type=Path), help="Write the picture here (PNG).")
def main(
    bundle: Path,
    labelled: Path | None,
    work: Path,
    methods: tuple[str, ...] | None,
    photos: int | None,
    threads: int,
    resamples: int,
    json_path: Path | None,
    plot_path: Path | None,
) -> None:
    """Compare encoder size, bytes and accuracy of all methods; print a Markdown table."""
    try:
        result = sc2(bundle, labelled, work, methods, photos, threads, resamples)
    except (IsthmusError, OSError) as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(1)
    if left_out := result["left_out"]:
        click.echo(f"left out, not trained yet: {training_command(left_out, work)}", err=True)
    click.echo(table(result))
    if json_path:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        click.echo(f"\nfigures: {json_path}")
    if plot_path:
        plot(result, plot_path)
        click.echo(f"picture: {plot_path}")


if __name__ == "__main__":
    main()
