"""The router and what it is compared with on a grid of links, devices and clouds, and on links that change.

A cell's best arm in hindsight is the fastest single arm of at least the router's quality there, which is its agreement
with the cloud's model, and its accuracy. Quality is counted: an answer that came late is the exit's.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from isthmus.edge_agent.config import EdgeConfig
from isthmus.edge_agent.vision.operating_points import OperatingPoints
from isthmus.models.vision.manifest import Manifest
from tests.bench.router_arms import always, baselines, follow, oracle, single_arms
from tests.bench.router_recording import Recording
from tests.bench.router_simulation import form_of, route
from tests.bench.router_world import Conditions, Outcome, World, way_name

MBITS, RTTS_MS, SLOWER = (0.25, 1, 5, 25, 100), (5, 20, 50, 100, 150), (1, 4)
TARGETS_S = (0.05, 0.1, 0.2, 0.4, 0.8)
TRACE_S, PERIOD_S = 120.0, 0.5
SETTLE_S = 10.0  # after a step, within which the router is to be near the best again

Row = dict[str, Any]


@dataclass(frozen=True)
class Bench:
    """A recording, its bundle and the agent's settings."""

    recording: Recording
    manifest: Manifest
    config: EdgeConfig

    def world(self, trace: Sequence[tuple[float, Conditions]], device: float = 1.0) -> World:
        return World(self.recording, trace, device, self.config.deadline_s)


def figures(recording: Recording, outcomes: Sequence[Outcome]) -> Row:
    """Quality, latency and bytes of a run."""
    photos_N = np.array([found.photo for found in outcomes])
    answer_N = np.array([found.answer for found in outcomes])
    seconds_N = np.array([found.seconds for found in outcomes])
    return {
        "mean_ms": round(1000 * float(seconds_N.mean()), 2),
        "p95_ms": round(1000 * float(np.percentile(seconds_N, 95)), 2),
        "accuracy": float((answer_N == recording.labels_N[photos_N]).mean()),
        "agreement": float((answer_N == recording.cloud_N[photos_N]).mean()),
        "bytes": round(float(np.mean([found.up_bytes for found in outcomes])), 1),
        "late": float(np.mean([found.late for found in outcomes])),
    }


def compare(bench: Bench, world: World, photos: int, period_s: float) -> tuple[Row, dict[str, list[Outcome]]]:
    """Everything on one world, and what became of each photo by name."""
    arms = single_arms(bench.recording, bench.manifest)
    runs = {f"arm {name}": follow(world, always(walk), photos, period_s) for name, walk in arms.items()}
    rules = {**baselines(bench.recording, bench.manifest, world), "oracle": oracle(arms)}
    runs |= {name: follow(world, rule, photos, period_s) for name, rule in rules.items()}
    runs["router"] = route(world, bench.manifest, bench.config, photos, period_s)
    rows = {name: figures(bench.recording, run) for name, run in runs.items()}
    rows["router"]["ways"] = dict(Counter(found.way for found in runs["router"]).most_common())
    best = hindsight(rows)
    found = {
        "best_arm": best,
        "ratio": ratio(rows, best),
        "ratio_allowed": ratio(rows, hindsight(rows, allowed(bench, rows))),
    }
    return {**found, "runs": rows}, runs


def allowed(bench: Bench, rows: Mapping[str, Row]) -> list[str]:
    """The arms of at least the router's quality that the bundle's figures do not exclude for an agent."""
    known = stated(bench.manifest)
    return [name for name in equals(rows) if known.get(name.removeprefix("arm "), 0.0) >= bench.config.min_agreement]


def stated(manifest: Manifest) -> dict[str, float]:
    """The agreement that the bundle states of each arm."""
    exits = {f"exit{index}": each.agreement for index, each in enumerate(manifest.heads["fp32"].exits)}
    points = {way_name(point): rate.agreement for point, rate in OperatingPoints(manifest).figures.items()}
    return {**exits, **points, **{form_of(way): way.agreement for way in manifest.images}}


def equals(rows: Mapping[str, Row]) -> list[str]:
    """The arms of at least the router's quality."""
    router = rows["router"]
    return [
        name
        for name, row in rows.items()
        if name.startswith("arm ") and row["agreement"] >= router["agreement"] and row["accuracy"] >= router["accuracy"]
    ]


def hindsight(rows: Mapping[str, Row], names: Sequence[str] | None = None) -> str | None:
    """The fastest of `names`, by default of the arms of at least the router's quality."""
    chosen = equals(rows) if names is None else names
    return min(chosen, key=lambda name: float(rows[name]["mean_ms"]), default=None)


def ratio(rows: Mapping[str, Row], best: str | None) -> float | None:
    """The router's mean latency over that arm's."""
    return round(rows["router"]["mean_ms"] / rows[best]["mean_ms"], 4) if best else None


def conditions(quick: bool) -> Iterator[tuple[float, float, float, float]]:
    """Mbit/s, round trip in ms, device and cloud of each cell; in quick mode the corners, one device and cloud."""
    mbits, rtts, slower = (MBITS[::4], RTTS_MS[::4], SLOWER[:1]) if quick else (MBITS, RTTS_MS, SLOWER)
    return itertools.product(mbits, rtts, slower, slower)


def grid(bench: Bench, photos: int, quick: bool) -> list[Row]:
    """Every cell."""
    cells = []
    for mbit, rtt_ms, device, cloud in conditions(quick):
        world = bench.world([(0.0, Conditions(mbit, rtt_ms / 1000, cloud))], device)
        row, _ = compare(bench, world, photos, 0.0)
        cells.append({"mbit": mbit, "rtt_ms": rtt_ms, "device": device, "cloud": cloud, **row})
    return cells


def latency_targets(bench: Bench, photos: int, quick: bool) -> list[Row]:
    """Each cell and target that some arm of the wished agreement meets: the share of photos in time, of both."""
    least, share = bench.config.min_agreement, bench.config.target_share
    arms = {
        name: walk
        for name, walk in single_arms(bench.recording, bench.manifest).items()
        if stated(bench.manifest).get(name, 0.0) >= least and walk.way is not None
    }
    found = []
    for mbit, rtt_ms, device, cloud in conditions(quick):
        world = bench.world([(0.0, Conditions(mbit, rtt_ms / 1000, cloud))], device)
        runs = [follow(world, always(walk), photos, 0.0) for walk in arms.values()]
        for target_s in TARGETS_S:
            best = max(in_time(run, target_s) for run in runs)
            if best >= share:
                run = route(world, bench.manifest, replace(bench.config, target_s=target_s), photos, 0.0)
                cell = {"mbit": mbit, "rtt_ms": rtt_ms, "device": device, "cloud": cloud}
                found.append({**cell, "target_s": target_s, "best": best, "router": in_time(run, target_s)})
    return found


def in_time(outcomes: Sequence[Outcome], target_s: float) -> float:
    """The share of photos answered within a time."""
    return float(np.mean([found.seconds <= target_s for found in outcomes]))


def once(cells: Sequence[Row]) -> Row:
    """The best single arm, chosen once for all cells, of at least the router's quality over all of them."""
    names = [name for name in cells[0]["runs"] if name.startswith("arm ") or name == "router"]
    rows = {
        name: {
            key: float(np.mean([cell["runs"][name][key] for cell in cells]))
            for key in ("mean_ms", "accuracy", "agreement")
        }
        for name in names
    }
    best = hindsight(rows)
    return {"best_arm": best, "ratio": ratio(rows, best), "router": rows["router"], "arm": rows[best] if best else None}


def traces() -> dict[str, list[tuple[float, Conditions]]]:
    """Links and clouds that change, by name."""
    fast, thin = Conditions(25, 0.02), Conditions(0.25, 0.1)
    rng, markov, now_s = random.Random(0), [], 0.0
    while now_s < TRACE_S:
        good = len(markov) % 2 == 0
        markov.append((now_s, Conditions(10, 0.03) if good else Conditions(0.5, 0.12, loss=0.02)))
        now_s += rng.expovariate(1 / (12 if good else 6))
    return {
        "steps": [(0.0, fast), (30.0, thin), (60.0, fast), (90.0, thin)],
        "outage": [(0.0, Conditions(5, 0.05)), (40.0, Conditions(0, 0.05)), (70.0, Conditions(5, 0.05))],
        "markov": markov,
        "slow cloud": [(0.0, fast), (40.0, Conditions(25, 0.02, cloud=10)), (80.0, fast)],
    }


def run_traces(bench: Bench, quick: bool) -> dict[str, Row]:
    """The router and the others on every trace; between steps, after the settling time, against the best arm there."""
    found = {}
    for name, trace in itertools.islice(traces().items(), 1 if quick else None):
        photos = int(TRACE_S / PERIOD_S)
        row, runs = compare(bench, bench.world(trace), photos, PERIOD_S)
        found[name] = {**row, "settled": settled(bench.recording, runs, [start_s for start_s, _ in trace])}
        found[name]["router_ms"] = [[round(o.started_s, 2), round(1000 * o.seconds, 1)] for o in runs["router"]]
    return found


def settled(recording: Recording, runs: Mapping[str, Sequence[Outcome]], steps: Sequence[float]) -> list[Row]:
    """From the settling time after each step to the next step: the router's mean over the best arm's.

    Quality is that of the whole run: a few photos say little about it.
    """
    names, rows = equals({name: figures(recording, run) for name, run in runs.items()}), []
    for start_s, end_s in zip(steps, [*steps[1:], TRACE_S], strict=True):
        parts = {
            name: [each for each in run if start_s + SETTLE_S <= each.started_s < end_s] for name, run in runs.items()
        }
        if len(parts["router"]) < 8:
            continue
        here = {name: figures(recording, part) for name, part in parts.items() if part}
        best = hindsight(here, [name for name in names if name in here])
        rows.append({"from_s": start_s + SETTLE_S, "best_arm": best, "ratio": ratio(here, best)})
    return rows
