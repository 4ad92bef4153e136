"""The simulator against real runs: a cloud process, an emulated link, an agent, and the same photos in both.

The simulation takes the seconds of each stage from the real run, so that load on the machine counts in both alike. What
is checked is everything else: what the router decides, what the link does to its messages, and what that adds up to.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from statistics import mean, median
from typing import Any

import numpy as np

from isthmus.edge_agent import Answer, EdgeAgent
from isthmus.edge_agent.config import Audits
from isthmus.models.vision.bundle import Bundle
from tests.bench.processes import CloudProcess
from tests.bench.proxy import LinkProxy, LinkSpec
from tests.bench.router_grid import Bench
from tests.bench.router_recording import Stages
from tests.bench.router_simulation import route
from tests.bench.router_world import Conditions
from tests.bench.sc2_photos import Photos

POINTS = ((0.25, 50), (1, 150), (5, 20), (25, 100))  # Mbit/s, ms of round trip
WITHIN = 0.10


def check(bench: Bench, bundle: Bundle, photos: Photos, count: int) -> list[dict[str, Any]]:
    """A row for each of four links: mean latency of the real run, and of the simulation of it."""
    chosen = np.random.default_rng(0).permutation(len(photos.labels_N))[:count]
    rows = []
    with CloudProcess(bundle.folder) as cloud:
        for mbit, rtt_ms in POINTS:
            with LinkProxy(cloud.port, LinkSpec(mbit * 1e6, rtt_ms / 1000)) as proxy:
                cloud_at = (f"127.0.0.1:{proxy.port}",)
                unaudited = replace(bench.config, audits=Audits(share=0.0))
                config = replace(unaudited, clouds=cloud_at, connect_s=20.0, threads=1)
                with EdgeAgent(config) as agent:
                    answers = [agent.infer(photos.image(int(photo))) for photo in chosen]
            rows.append({"mbit": mbit, "rtt_ms": rtt_ms, **compared(bench, answers, mbit, rtt_ms)})
    return rows


def compared(bench: Bench, answers: Sequence[Answer], mbit: float, rtt_ms: float) -> dict[str, Any]:
    real_ms = mean(answer.stage_ms["total"] for answer in answers)
    recording = replace(bench.recording, stages=stages_of(answers, bench))
    again = replace(bench, recording=recording)
    world = again.world([(0.0, Conditions(mbit, rtt_ms / 1000))])
    outcomes = route(world, bench.manifest, bench.config, len(answers), 0.0)
    simulated_ms = 1000 * mean(outcome.seconds for outcome in outcomes)
    return {
        "n": len(answers),
        "real_ms": round(real_ms, 2),
        "simulated_ms": round(simulated_ms, 2),
        "error": round(simulated_ms / real_ms - 1, 4),
        "real_sent": mean(answer.bytes_up > 0 for answer in answers),
        "simulated_sent": mean(outcome.up_bytes > 0 for outcome in outcomes),
    }


def stages_of(answers: Sequence[Answer], bench: Bench) -> Stages:
    """The recording's stages, with the seconds of this run in place of those that it has."""
    recorded = bench.recording.stages
    found: dict[object, list[float]] = defaultdict(list)
    exits = [each.name for each in bench.manifest.heads["fp32"].exits]
    taps = {tap.name: index for index, tap in enumerate(bench.manifest.taps)}
    first_s = median([a.stage_ms["head"] for a in answers if a.exit == exits[0]] or [1000 * mean(recorded.segments[0])])
    for answer in answers:
        seconds = {name: value / 1000 for name, value in answer.stage_ms.items()}
        found["decode"].append(seconds["decode"])
        if "head" in seconds:
            head_s = seconds["head"]
            deeper = answer.exit != exits[0]
            found["segment", 0].append(first_s / 1000 if deeper else head_s)
            if deeper:
                found["segment", 1].append(max(head_s - first_s / 1000, 0.0))
        if answer.route in ("split", "offload"):
            way = (taps[answer.tap], width_of(answer, bench)) if answer.tap else "image"
            found["encode", way].append(seconds["encode"])
            tap = taps[answer.tap] if answer.tap else "image"
            found["cloud", tap].append(seconds["cloud_queue"] + seconds["cloud_compute"])
    return Stages(
        decode=found["decode"],
        segments=[found["segment", i] or runs for i, runs in enumerate(recorded.segments)],
        encode=[
            [found["encode", (t, w)] or runs for w, runs in enumerate(widths)]
            for t, widths in enumerate(recorded.encode)
        ],
        image_encode={form: found["encode", "image"] or runs for form, runs in recorded.image_encode.items()},
        cloud_image=found["cloud", "image"] or recorded.cloud_image,
        cloud_tap=[found["cloud", tap] or runs for tap, runs in enumerate(recorded.cloud_tap)],
        exchange=recorded.exchange,
    )


def width_of(answer: Answer, bench: Bench) -> int:
    widths = next(tap.widths for tap in bench.manifest.taps if tap.name == answer.tap)
    return next(index for index, width in enumerate(widths) if width.width == answer.width)
