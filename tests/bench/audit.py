"""How soon the audit of exits alarms after photos shift, and how often without a shift.

    recorded answers -> at the thresholds that the bundle ships, or half of them -> levels as by `recalibrate`
                     -> streams drawn at random -> policy.audit, many runs at once

Every photo is answered once a corruption; streams of any length are drawn from that. A corruption under which exits
differ from the cloud model no more often than promised gives no reason for an alarm, and is marked so; `every` says in
how many runs an audit of every photo would have alarmed.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.progress import track

from isthmus.edge_agent.policy.audit import Level, Pair
from isthmus.edge_agent.policy.recalibration import recalibrated
from isthmus.edge_agent.vision.audit import audited_levels
from isthmus.models.bundle.installed import find
from isthmus.models.errors import IsthmusError
from isthmus.models.recipes.common.intervals import interval
from isthmus.models.vision.bundle import Bundle
from isthmus.models.vision.manifest import Promise
from tests.bench.audit_recording import AS_IS, Recorded, recorded
from tests.bench.audit_runs import Outcome, Runs, Stream, run

BEFORE, WITHIN, UNSHIFTED = 3000, 2000, 20_000  # inputs before a shift, after it, and of a run without one
SHIPPED: tuple[tuple[Promise, float], ...] = (("accuracy", 0.005), ("agreement", 0.01))
Row = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A promise that is audited, and the level whose first alarm ends a run."""

    name: str
    epsilon: float
    level: Level


def shipped(bundle: Bundle, promise: Promise, epsilon: float) -> Case | None:
    """What an agent with these settings audits; None where no exit may answer."""
    rate, levels = audited_levels(bundle.manifest.heads["fp32"], epsilon, promise)
    return Case(f"{promise} {epsilon:.1%}, as shipped", rate, levels[0]) if levels else None


def split(answers: dict[str, Recorded], epsilon: float) -> tuple[Case | None, dict[str, Recorded]]:
    """A level certified from half of the photos, and the other half; no case where none is certified."""
    order = np.random.default_rng(0).permutation(len(answers[AS_IS]))
    half, rest = order[: len(order) // 2], order[len(order) // 2 :]
    part = answers[AS_IS].part(half)
    rows = zip(part.scores_NE.tolist(), part.answers_NE.tolist(), part.cloud_N.tolist(), strict=True)
    found = recalibrated([Pair(tuple(scores), tuple(labels), cloud) for scores, labels, cloud in rows], epsilon)
    certified = bool(found) and found[0].epsilon == epsilon
    case = Case(f"agreement {epsilon:.1%}, recalibrated", epsilon, found[0].level) if certified else None
    return case, {kind: each.part(rest) for kind, each in answers.items()}


def alarms(outcome: Outcome) -> Row:
    """The share of runs that alarmed, with its interval."""
    return dict(interval(outcome.alarm_R > 0).model_dump())


def shifted(case: Case, share: float, runs: int, streams: tuple[Stream, Stream], seed: int) -> Row:
    """Alarms within WITHIN inputs after the shift, of runs without an alarm before it."""
    random = np.random.default_rng(seed)
    sampled, full = (Runs(case.epsilon, each, runs) for each in (share, 1.0))
    calm = [each.only(run(each, streams[0], BEFORE, random).alarm_R == 0) for each in (sampled, full)]
    after, ceiling = (run(each, streams[1], WITHIN, random) for each in calm)
    delays = after.alarm_R[after.alarm_R > 0]
    disagreement = float(streams[1].differs_N.mean())
    return {
        "disagreement": disagreement,
        "coverage": float(streams[1].exits_N.mean()),
        "runs": len(after.alarm_R),
        "alarmed": alarms(after),
        "ceiling": alarms(ceiling),
        "median_delay": float(np.median(delays)) if delays.size else None,
        "uploads_per_input": after.uploads / after.inputs,
        "reason": disagreement > case.epsilon,
    }


def unshifted(case: Case, share: float, runs: int, stream: Stream, inputs: int) -> Row:
    """False alarms, and what the audits cost."""
    outcome = run(Runs(case.epsilon, share, runs), stream, inputs, np.random.default_rng(0))
    return {
        "disagreement": float(stream.differs_N.mean()),
        "coverage": float(stream.exits_N.mean()),
        "inputs": inputs,
        "false_alarms": alarms(outcome),
        "uploads_per_input": outcome.uploads / outcome.inputs,
    }


def measure(answers: dict[str, Recorded], case: Case, share: float, runs: int, inputs: int) -> Row:
    """All figures of one case."""
    streams = {kind: Stream.of(each, case.level) for kind, each in answers.items()}
    kinds = track([kind for kind in streams if kind != AS_IS], "shifts", console=Console(stderr=True), transient=True)
    return {
        "case": case.name,
        "photos": len(answers[AS_IS]),
        "promised": case.epsilon,
        "confidences": case.level.confidences,
        "share": share,
        "runs": runs,
        "unshifted": unshifted(case, share, runs, streams[AS_IS], inputs),
        "shifts": {
            kind: shifted(case, share, runs, (streams[AS_IS], streams[kind]), seed)
            for seed, kind in enumerate(kinds, start=1)
        },
    }


def percent(share: Row) -> str:
    """With its interval."""
    return f"{share['value']:.1%} [{share['low']:.1%}, {share['high']:.1%}]"


def table(row: Row) -> str:
    """Markdown."""
    free = row["unshifted"]
    lines = [
        f"{row['case']}: {row['photos']} photos, promised disagreement {row['promised']:.2%}, base share"
        f" {row['share']:.1%}; unshifted {free['disagreement']:.2%} differ, {free['coverage']:.0%} exit, alarms in"
        f" {percent(free['false_alarms'])} of {row['runs']} runs of {free['inputs']}, {free['uploads_per_input']:.2%}"
        " uploads an input",
        "",
        "| shift | differ | exit | alarms within 2,000 | median delay | every | uploads | reason to alarm |",
        "|---|---:|---:|---:|---:|---:|---:|---|",
    ]
    for kind, each in row["shifts"].items():
        delay = "-" if each["median_delay"] is None else f"{each['median_delay']:.0f}"
        lines.append(
            f"| {kind} | {each['disagreement']:.2%} | {each['coverage']:.0%} | {percent(each['alarmed'])} | {delay} |"
            f" {each['ceiling']['value']:.1%} | {each['uploads_per_input']:.0%} | {'yes' if each['reason'] else 'no'} |"
        )
    return "\n".join(lines)


def cases(bundle: Bundle, answers: dict[str, Recorded], epsilon: float) -> list[tuple[dict[str, Recorded], Case]]:
    """What the bundle ships, and a recalibration to `epsilon`; with the photos that took no part in either."""
    found: list[tuple[dict[str, Recorded], Case | None]] = [(answers, shipped(bundle, *each)) for each in SHIPPED]
    case, rest = split(answers, epsilon)
    return [(photos, each) for photos, each in [*found, (rest, case)] if each]


@click.command(epilog="Example: python -m tests.bench.audit --json runs/audit.json")
@click.option("--bundle", "bundles", multiple=True, default=("fashion",), show_default=True)
@click.option("--recordings", default="runs/audit", show_default=True, type=click.Path(path_type=Path))
@click.option("--data", default="runs/fashion/data", show_default=True, type=click.Path(path_type=Path))
@click.option("--photos", default=4000, show_default=True, type=click.IntRange(10), help="Photos answered a bundle.")
@click.option(
    "--epsilon", default=0.01, show_default=True, type=click.FloatRange(0, 1), help="Promised by a recalibration."
)
@click.option("--share", default=0.01, show_default=True, type=click.FloatRange(0, 1), help="Share of audits.")
@click.option("--runs", default=1000, show_default=True, type=click.IntRange(1))
@click.option("--inputs", default=UNSHIFTED, show_default=True, type=click.IntRange(1), help="Of an unshifted run.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write all figures here.")
def main(
    bundles: tuple[str, ...], recordings: Path, data: Path, photos: int, epsilon: float, share: float, runs: int,
    inputs: int, json_path: Path | None,
) -> None:  # fmt: skip
    """Measure the audit's alarms; print Markdown tables."""
    result: Row = {"machine": f"{platform.machine()}, {os.cpu_count()} cores", "runs": runs}
    try:
        for name in bundles:
            bundle = Bundle.open(find(Path(name)))
            answers = recorded(bundle, recordings / f"{name}.npz", data, photos)
            result[name] = [measure(*each, share, runs, inputs) for each in cases(bundle, answers, epsilon)]
            click.echo("\n\n".join([f"## {name}", *map(table, result[name])]) + "\n")
    except (IsthmusError, OSError) as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(1)
    if json_path:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        click.echo(f"figures: {json_path}")


if __name__ == "__main__":
    main()
