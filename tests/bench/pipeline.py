"""Photos a second of a stream, one at a time and pipelined, through a real cloud process behind an emulated link.

    python -m tests.bench.pipeline --json FILE [--photos 60] [--rtt-ms 100] [--mbps 10] [--bundle elpv]

Every photo is sent. Both runs are side by side with one agent, one cloud and one link; order is checked.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import click
from PIL import Image, ImageChops

from isthmus.edge_agent import EdgeAgent, EdgeConfig
from isthmus.edge_agent.vision.result import Answer
from isthmus.models.bundle.installed import find
from tests.bench.processes import ROOT, CloudProcess
from tests.bench.proxy import LinkProxy, LinkSpec

WARM_UP = 5  # photos before the measurement


def photos(sample: Path, count: int) -> list[Image.Image]:
    """One photo, shifted each time by another step."""
    with Image.open(sample) as image:
        return [ImageChops.offset(image.copy(), 7 * index, 3 * index) for index in range(count)]


def measure(agent: EdgeAgent, stream: list[Image.Image]) -> dict[str, Any]:
    """Frames a second of both ways, and whether the pipelined answers are those of the photos in order."""
    for photo in stream[:WARM_UP]:
        agent.infer(photo)
    started_s = time.monotonic()
    alone = [agent.infer(photo) for photo in stream]
    alone_s = time.monotonic() - started_s
    started_s = time.monotonic()
    piped = [answer for answer in agent.infer_many(stream) if isinstance(answer, Answer)]
    piped_s = time.monotonic() - started_s
    return {
        "photos": len(stream),
        "alone_fps": round(len(stream) / alone_s, 2),
        "pipelined_fps": round(len(stream) / piped_s, 2),
        "speedup": round(alone_s / piped_s, 2),
        "in_order": [answer.label for answer in alone] == [answer.label for answer in piped],
        "degraded": [sum(answer.degraded for answer in answers) for answers in (alone, piped)],
    }


@click.command()
@click.option("--json", "out", type=Path)
@click.option("--photos", "count", default=60)
@click.option("--rtt-ms", default=100.0)
@click.option("--mbps", default=10.0)
@click.option("--bundle", default="elpv")
def main(out: Path | None, count: int, rtt_ms: float, mbps: float, bundle: str) -> None:
    """Measure, print, and write JSON."""
    folder = find(Path(bundle))
    with CloudProcess(folder) as cloud, LinkProxy(cloud.port, LinkSpec(mbps * 1e6, rtt_ms / 1000)) as proxy:
        config = EdgeConfig(bundle=folder, clouds=(f"127.0.0.1:{proxy.port}",), mode="split", deadline_s=5.0, threads=1)
        with EdgeAgent(config) as agent:
            found = measure(agent, photos(ROOT / "docs/samples/cell.png", count))
    found |= {"rtt_ms": rtt_ms, "mbps": mbps, "bundle": bundle}
    print(json.dumps(found, indent=2))
    if out:
        out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
