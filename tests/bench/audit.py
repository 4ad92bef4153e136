"""How soon the audit of exits alarms after photos shift, and how often without a shift.

    recorded answers --half--> levels certified as by `edge-agent recalibrate`
                     --other half--> streams drawn at random -> policy.audit, input by input

Every photo is answered once a corruption; streams of any length are drawn from that. A corruption under which exits
differ from the cloud model no more often than promised gives no reason for an alarm, and is marked so.
"""

from __future__ import annotations

import json
import math
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

from isthmus.edge_agent.policy.audit import Audit, Level, Pair
from isthmus.edge_agent.policy.recalibration import recalibrated
from isthmus.models.bundle.installed import find
from isthmus.models.errors import IsthmusError
from isthmus.models.recipes.common.intervals import interval
from isthmus.models.vision.bundle import Bundle
from tests.bench.audit_recording import AS_IS, Recorded, recorded

BEFORE, WITHIN, UNSHIFTED = 3000, 2000, 20_000  # inputs before a shift, after it, and of a run without one
Row = dict[str, Any]


@dataclass(frozen=True)
class Stream:
    """Photos to draw from, as pairs; and whether the first exit that may answer does, at the level in force."""

    pairs: list[Pair]

    @classmethod
    def of(cls, answers: Recorded) -> Stream:
        """Every photo of a recording."""
        rows = zip(answers.scores_NE.tolist(), answers.answers_NE.tolist(), answers.cloud_N.tolist(), strict=True)
        return cls([Pair(tuple(scores), tuple(found), cloud) for scores, found, cloud in rows])

    def disagreement(self, level: Level) -> float:
        """Among all photos."""
        return sum(level.differs(pair) for pair in self.pairs) / len(self.pairs)

    def coverage(self, level: Level) -> float:
        """The share that exits answer."""
        return sum(level.exit(pair.scores) is not None for pair in self.pairs) / len(self.pairs)


def run(audit: Audit, stream: Stream, inputs: int, random: np.random.Generator) -> tuple[int | None, int]:
    """Inputs until the first alarm, None without one; and the uploads of the audit."""
    sent = 0
    for count, index in enumerate(random.integers(len(stream.pairs), size=inputs).tolist(), start=1):
        pair, level = stream.pairs[index], audit.in_force
        first = level.first if level else None
        reached = None if level is None or first is None else pair.scores[first] >= level.confidences[first]
        if audit.draw(reached):
            sent += level is not None and level.exit(pair.scores) is not None
            if audit.add(pair):
                return count, sent
    return None, sent


def shifted(
    epsilon: float, levels: list[Level], share: float, streams: tuple[Stream, Stream], runs: int
) -> tuple[Row, list[int]]:
    """Alarms within WITHIN inputs after the shift, of runs without an alarm before it."""
    delays, valid = [], 0
    for seed in range(runs):
        random, audit = np.random.default_rng(seed), Audit(epsilon, levels, share, seed)
        if run(audit, streams[0], BEFORE, random)[0] is not None:
            continue
        valid += 1
        delay, _ = run(audit, streams[1], WITHIN, random)
        if delay is not None:
            delays.append(delay)
    level = levels[0]
    row = {
        "disagreement": streams[1].disagreement(level),
        "coverage": streams[1].coverage(level),
        "alarmed": interval(np.arange(valid) < len(delays)).model_dump(),
        "median_delay": float(np.median(delays)) if delays else None,
        "reason": streams[1].disagreement(level) > epsilon,
        "nats_if_all_were_audited": WITHIN * divergence(streams[1].disagreement(level), epsilon),
    }
    return row, delays


def divergence(rate: float, epsilon: float) -> float:
    """Of one observation, in nats: what bets for `rate` against `epsilon` it gives on average; 0 below epsilon."""
    if rate <= epsilon:
        return 0.0
    rest = (1 - rate) * math.log((1 - rate) / (1 - epsilon)) if rate < 1 else 0.0
    return rate * math.log(rate / epsilon) + rest


def unshifted(epsilon: float, levels: list[Level], share: float, stream: Stream, runs: int, inputs: int) -> Row:
    """False alarms, and what the audits cost."""
    alarms, sent, seen = 0, 0, 0
    for seed in range(runs):
        audit = Audit(epsilon, levels, share, seed)
        at, uploads = run(audit, stream, inputs, np.random.default_rng(seed))
        alarms, sent, seen = alarms + (at is not None), sent + uploads, seen + (at or inputs)
    return {
        "disagreement": stream.disagreement(levels[0]),
        "coverage": stream.coverage(levels[0]),
        "inputs": inputs,
        "false_alarms": interval(np.arange(runs) < alarms).model_dump(),
        "uploads_per_input": sent / seen,
    }


def measure(answers: dict[str, Recorded], epsilon: float, share: float, runs: int, inputs: int) -> Row:
    """All figures of one bundle."""
    order = np.random.default_rng(0).permutation(len(answers[AS_IS]))
    calibration, rest = order[: len(order) // 2], order[len(order) // 2 :]
    certificates = recalibrated(Stream.of(answers[AS_IS].part(calibration)).pairs, epsilon)
    if not certificates or certificates[0].epsilon < epsilon:
        return {"photos": len(order), "epsilon": epsilon, "certified": False}
    levels = [each.level for each in certificates]
    streams = {kind: Stream.of(each.part(rest)) for kind, each in answers.items()}
    kinds = track([kind for kind in streams if kind != AS_IS], "shifts", console=Console(stderr=True), transient=True)
    return {
        "photos": len(order),
        "epsilon": epsilon,
        "certified": True,
        "share": share,
        "levels": [level.confidences[0] for level in levels],
        "unshifted": unshifted(epsilon, levels, share, streams[AS_IS], runs, inputs),
        "shifts": {kind: shifted(epsilon, levels, share, (streams[AS_IS], streams[kind]), runs)[0] for kind in kinds},
    }


def table(name: str, row: Row) -> str:
    """Markdown."""
    if not row["certified"]:
        return (
            f"{name}: {row['photos']} photos certify no threshold at {row['epsilon']:.1%}; there is nothing to audit."
        )
    free = row["unshifted"]
    lines = [
        f"{name}: {row['photos']} photos, promised disagreement {row['epsilon']:.1%}, base share {row['share']:.1%};"
        f" unshifted: {free['disagreement']:.2%} differ, {free['coverage']:.0%} exit, false alarms in"
        f" {free['false_alarms']['value']:.1%} of runs of {free['inputs']}, {free['uploads_per_input']:.2%} uploads an"
        " input",
        "",
        "| shift | differ | exit | alarms within 2,000 | median delay | reason to alarm |",
        "|---|---:|---:|---:|---:|---|",
    ]
    for kind, each in row["shifts"].items():
        delay = "-" if each["median_delay"] is None else f"{each['median_delay']:.0f}"
        lines.append(
            f"| {kind} | {each['disagreement']:.2%} | {each['coverage']:.0%} | {each['alarmed']['value']:.1%}"
            f" [{each['alarmed']['low']:.1%}, {each['alarmed']['high']:.1%}] | {delay} |"
            f" {'yes' if each['reason'] else 'no'} |"
        )
    return "\n".join(lines)


@click.command(epilog="Example: python -m tests.bench.audit --json runs/audit.json")
@click.option("--bundle", "bundles", multiple=True, default=("fashion", "elpv"), show_default=True)
@click.option("--recordings", default="runs/audit", show_default=True, type=click.Path(path_type=Path))
@click.option("--data", default="runs/fashion/data", show_default=True, type=click.Path(path_type=Path))
@click.option("--photos", default=4000, show_default=True, type=click.IntRange(10), help="Photos answered a bundle.")
@click.option("--epsilon", default=0.01, show_default=True, type=click.FloatRange(0, 1), help="Promised disagreement.")
@click.option("--share", default=0.01, show_default=True, type=click.FloatRange(0, 1), help="Share of audits.")
@click.option("--runs", default=200, show_default=True, type=click.IntRange(1))
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
            answers = recorded(Bundle.open(find(Path(name))), recordings / f"{name}.npz", data, photos)
            result[name] = measure(answers, epsilon, share, runs, inputs)
            click.echo(table(name, result[name]) + "\n")
    except (IsthmusError, OSError) as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(1)
    if json_path:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        click.echo(f"figures: {json_path}")


if __name__ == "__main__":
    main()
