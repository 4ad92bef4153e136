"""The router on a grid of links, devices and clouds, and on links that change, against what it could have done instead.

A simulation: measured answers and stage times of every way of a bundle are replayed through the agent's own policy,
cost model and link estimates. `--record` measures them anew, `--check` compares the simulator with real runs.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from isthmus.edge_agent.config import EdgeConfig
from isthmus.edge_agent.vision.operating_points import OperatingPoints
from isthmus.models.errors import InvalidInput, IsthmusError
from isthmus.models.vision.bundle import Bundle
from tests.bench.processes import ROOT
from tests.bench.router_grid import Bench, grid, latency_targets, once, run_traces
from tests.bench.router_recording import Recording
from tests.bench.sc2_photos import labelled_option, photos_of

RESULTS = ROOT / "tests" / "bench" / "results"
COMPARED = ("SPINN", "Sedna", "fixed confidence", "Neurosurgeon", "oracle")
DEADLINE_S = 2.0
NEAR = 1.05  # times the best arm's mean latency

Row = dict[str, Any]


def bench_of(bundle: Bundle, recording: Recording) -> Bench:
    """Raises InvalidInput if the recording has other ways than the bundle.

    Fingerprints may differ: a bundle whose figures are measured anew has another one, and answers as before.
    """
    exits, points = len(bundle.manifest.segments), OperatingPoints(bundle.manifest).figures.keys()
    if recording.points.keys() != points or recording.exits_NEK.shape[1] != exits:
        raise InvalidInput(
            f"the recording of bundle {recording.name} has other exits, taps or rates than {bundle.folder}"
        )
    return Bench(recording, bundle.manifest, EdgeConfig(bundle.folder, ("simulated:1",), deadline_s=DEADLINE_S))


def summary(cells: list[Row], traces: dict[str, Row], targets: list[Row], share: float) -> Row:
    """What the benchmark is to show."""
    ratios = [cell["ratio"] for cell in cells if cell["ratio"] is not None]
    worst = max(cells, key=lambda cell: cell["ratio"] or 0.0)
    everywhere = ("router", *COMPARED)
    means = {
        name: {
            key: round(sum(cell["runs"][name][key] for cell in cells) / len(cells), 4)
            for key in ("mean_ms", "accuracy", "agreement", "late")
        }
        for name in everywhere
    }
    settled = [row["ratio"] for trace in traces.values() for row in trace["settled"] if row["ratio"]]
    return {
        "cells": len(cells),
        "cells_with_an_arm_of_that_quality": len(ratios),
        "worst_ratio": max(ratios, default=None),
        "worst_cell": {key: worst[key] for key in ("mbit", "rtt_ms", "device", "cloud", "best_arm")},
        "cells_above": sum(ratio > NEAR for ratio in ratios),
        "worst_ratio_allowed": max((cell["ratio_allowed"] for cell in cells if cell["ratio_allowed"]), default=None),
        "chosen_once": once(cells),
        "whole_grid": means,
        "settled_worst": max(settled, default=None),
        "targets": len(targets),
        "targets_missed": sum(row["router"] < share for row in targets),
    }


def report(found: Row) -> str:
    """Markdown."""
    chosen = found["chosen_once"]
    lines = ["| | mean ms | accuracy | agreement | late |", "|---|---:|---:|---:|---:|"]
    for name, row in found["whole_grid"].items():
        lines.append(
            f"| {name} | {row['mean_ms']:.0f} | {row['accuracy']:.1%} | {row['agreement']:.1%} | {row['late']:.1%} |"
        )
    if chosen["arm"]:
        row = chosen["arm"]
        lines.append(
            f"| one arm for all cells: {chosen['best_arm'].removeprefix('arm ')} | {row['mean_ms']:.0f} |"
            f" {row['accuracy']:.1%} | {row['agreement']:.1%} | |"
        )
    lines += [
        "",
        f"{found['cells']} cells; against the best arm in hindsight of at least its quality: at worst "
        f"{found['worst_ratio']} of its mean latency, more than {NEAR:g} in {found['cells_above']} cells "
        f"(no such arm in {found['cells'] - found['cells_with_an_arm_of_that_quality']}).",
        f"Of those arms that the bundle's figures allow: at worst {found['worst_ratio_allowed']}.",
        f"Against the arm chosen once: {chosen['ratio']}. Ten seconds after a step: at worst {found['settled_worst']}.",
        f"Latency targets that an arm of the wished agreement meets: missed {found['targets_missed']} of"
        f" {found['targets']}.",
    ]
    return "\n".join(lines)


def slim(value: Any) -> Any:
    """For the file: fractions with four places, and of single arms only what they are compared by."""
    if isinstance(value, dict):
        return {key: slim(arm(item) if key.startswith("arm ") else item) for key, item in value.items()}
    if isinstance(value, list):
        return [slim(item) for item in value]
    return round(value, 4) if isinstance(value, float) else value


def arm(row: Row) -> Row:
    return {key: row[key] for key in ("mean_ms", "accuracy", "agreement")}


@click.command(epilog="Example: python -m tests.bench.router --json runs/router.json --plot runs/router.png")
@click.option("--bundle", default=ROOT / "models" / "zoo" / "elpv", type=click.Path(path_type=Path))
@click.option(
    "--recording", "recorded", default=RESULTS / "router_recording.json", type=click.Path(path_type=Path), help="JSON."
)
@click.option("--record", "count", type=click.IntRange(2), help="Measure this many test photos first; minutes.")
@click.option("--check", "checked", type=click.IntRange(2), help="Compare with real runs of this many photos; minutes.")
@labelled_option
@click.option("--photos", default=160, show_default=True, type=click.IntRange(2), help="Photos in each cell.")
@click.option("--order", type=click.IntRange(0), help="Shuffle the recorded photos with this seed.")
@click.option("--quick", is_flag=True, help="The corners of the grid, and one trace.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write all figures here.")
@click.option("--plot", "plot_path", type=click.Path(path_type=Path), help="Write the picture here (PNG).")
def main(
    bundle: Path,
    recorded: Path,
    count: int | None,
    checked: int | None,
    labelled: Path | None,
    photos: int,
    order: int | None,
    quick: bool,
    json_path: Path | None,
    plot_path: Path | None,
) -> None:
    """Compare the router with single arms, an oracle, and the rules of other systems."""
    try:
        opened = Bundle.open(bundle)
        if count:
            from tests.bench.router_record import record

            part = photos_of(opened.manifest.tasks[0].name, labelled)
            record(opened, part, count, recorded.with_suffix(".jsonl")).save(recorded)
        recording = Recording.load(recorded)
        bench = bench_of(opened, recording if order is None else recording.shuffled(order))
        cells, traces = grid(bench, photos, quick), run_traces(bench, quick)
        targets = latency_targets(bench, photos, quick)
        result = {
            "recording": {"machine": recording.machine, "photos": len(recording), "bundle": recording.fingerprint},
            "bundle": opened.fingerprint.hex(),
            "summary": summary(cells, traces, targets, bench.config.target_share),
            "cells": cells,
            "traces": traces,
            "targets": targets,
        }
        if checked:
            from tests.bench.router_check import check

            result["check"] = check(bench, opened, photos_of(opened.manifest.tasks[0].name, labelled), checked)
    except (IsthmusError, OSError, RuntimeError) as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(1)
    click.echo(report(result["summary"]))
    for row in result.get("check", ()):
        click.echo(f"check: {json.dumps(row)}")
    if json_path:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(json.dumps(slim(result), separators=(",", ":")) + "\n", encoding="utf-8")
        click.echo(f"figures: {json_path}")
    if plot_path:
        from tests.bench.router_plot import plot

        plot(result, plot_path)
        click.echo(f"picture: {plot_path}")


if __name__ == "__main__":
    main()
