"""A day of photos on a metered link: what a byte budget lets through, drawn over time.

    python -m tests.bench.budget_day --plot FILE [--json FILE]

The router's simulator (`tests.bench.router`), with the agent's own ledger: a photo every ten seconds, a budget for the
day, and another day without one.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np

from isthmus.edge_agent.config import EdgeConfig
from isthmus.edge_agent.spending import Budgets
from isthmus.models.vision.bundle import Bundle
from tests.bench.processes import ROOT
from tests.bench.router import bench_of
from tests.bench.router_recording import Recording
from tests.bench.router_simulation import route
from tests.bench.router_world import REPLY_BYTES, Conditions, Outcome, World

RESULTS = ROOT / "tests" / "bench" / "results"
METERED = Conditions(1.0, 0.1)
HOUR_S = 3600.0


def by_hour(found: list[Outcome], recording: Recording, hours: int) -> dict[str, Any]:
    """Bytes of messages both ways until the end of each hour; in each, the share sent and the share that agrees."""
    hour_N = np.minimum([int(each.started_s // HOUR_S) for each in found], hours - 1)
    sent_N = np.array([each.up_bytes > 0 for each in found])
    bytes_N = np.array([each.up_bytes + REPLY_BYTES * (each.up_bytes > 0) for each in found])
    agrees_N = np.array([each.answer == recording.cloud_N[each.photo] for each in found])
    photos_H = np.bincount(hour_N, minlength=hours)
    return {
        "bytes": np.cumsum(np.bincount(hour_N, bytes_N, hours)).tolist(),
        "sent": (np.bincount(hour_N, sent_N, hours) / photos_H).tolist(),
        "agreement": (np.bincount(hour_N, agrees_N, hours) / photos_H).tolist(),
    }


def plot(result: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    spent, quality = figure.subplots(2, sharex=True, height_ratios=(2, 1))
    hours = range(1, result["hours"] + 1)
    for name, day in result["days"].items():
        spent.plot(hours, np.asarray(day["bytes"]) / 1e3, label=name)
        quality.plot(hours, 100 * np.asarray(day["agreement"]), label=name)
    spent.axhline(result["budget_bytes"] / 1e3, color="grey", linestyle="--", label="the day's budget")
    spent.set(ylabel="kilobytes sent and received")
    quality.set(xlabel="hour", ylabel="agreement, %")
    spent.legend()
    figure.savefig(path, dpi=110)


@click.command(epilog="Example: python -m tests.bench.budget_day --plot runs/day.png")
@click.option("--kilobytes", default=500.0, show_default=True, type=click.FloatRange(1), help="The day's budget.")
@click.option("--hours", default=24, show_default=True, type=click.IntRange(1, 48))
@click.option("--period", default=10.0, show_default=True, type=click.FloatRange(0.1), help="Seconds between photos.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write all figures here.")
@click.option("--plot", "plot_path", type=click.Path(path_type=Path), help="Write the picture here (PNG).")
def main(kilobytes: float, hours: int, period: float, json_path: Path | None, plot_path: Path | None) -> None:
    """Draw a day's byte budget on a metered link."""
    bundle = Bundle.open(ROOT / "models" / "zoo" / "elpv")
    bench = bench_of(bundle, Recording.load(RESULTS / "router_recording.json"))
    world: World = bench.world([(0.0, METERED)])
    count, limit = int(hours * HOUR_S / period), 1000 * kilobytes
    days: dict[str, EdgeConfig] = {
        "no budget": bench.config,
        f"{kilobytes:g} kB a day": replace(bench.config, budgets=Budgets(bytes_day=limit)),
    }
    result = {
        "budget_bytes": limit,
        "hours": hours,
        "days": {
            name: by_hour(route(world, bench.manifest, config, count, period), bench.recording, hours)
            for name, config in days.items()
        },
    }
    for name, day in result["days"].items():  # type: ignore[attr-defined]
        print(
            f"{name}: {day['bytes'][-1] / 1e3:.0f} kB, {np.mean(day['sent']):.1%} of the photos sent, "
            f"agreement {np.mean(day['agreement']):.1%}"
        )
    if json_path:
        json_path.write_text(json.dumps(result))
    if plot_path:
        plot(result, plot_path)


if __name__ == "__main__":
    main()
