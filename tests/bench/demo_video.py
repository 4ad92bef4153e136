"""A camera's clip over a thin link: frames sent as JPEG files beside the bottleneck, each against the whole network.

A real cloud process with the bundle `objects`, and one agent for each way with an emulated link of its own, through the
code of `edge-agent watch`. The reference is the whole network's boxes on the same frames, sent without loss and without
the emulated link; nothing is labelled. Ways run one after another, so that each has the machine for itself.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from isthmus.edge_agent import EdgeAgent, EdgeConfig
from isthmus.edge_agent.config import WholeImage
from isthmus.edge_agent.streams.agreement import unmatched
from isthmus.edge_agent.streams.camera import Camera
from isthmus.edge_agent.streams.config import StreamConfig
from isthmus.edge_agent.streams.frames import Frame
from isthmus.edge_agent.streams.sources import Source, parse_source
from isthmus.models.errors import IsthmusError
from isthmus.models.recipes.vision.average_precision import mean_average_precision
from isthmus.models.vision.detection.boxes import Boxes
from tests.bench.clips import clip as fetched_clip
from tests.bench.demo_video_picture import plot
from tests.bench.processes import ROOT, CloudProcess
from tests.bench.proxy import LinkProxy, LinkSpec

BUNDLE = ROOT / "models" / "zoo" / "objects"
WHOLE = EdgeConfig(BUNDLE, mode="offload", deadline_s=30.0, whole_image=WholeImage("png"))
WAYS = {
    "JPEG frames, quality 75": EdgeConfig(BUNDLE, mode="offload", deadline_s=30.0, whole_image=WholeImage("jpeg", 75)),
    "Isthmus": EdgeConfig(BUNDLE, mode="split", deadline_s=30.0),
    "Isthmus, --min-agreement 0.7": EdgeConfig(BUNDLE, mode="split", deadline_s=30.0, min_agreement=0.7),
}


@dataclass
class Run:
    """One way through the clip. `wire_bytes`: up, with HTTP/2 and connection set-up."""

    seconds: float
    wire_bytes: int
    frames: list[Frame] = field(default_factory=list)

    @property
    def boxes(self) -> list[Boxes]:
        return [boxes_of(frame) for frame in self.frames]


def watch(
    source: Source, config: EdgeConfig, fps: float | None, seen: Callable[[], object]
) -> tuple[float, list[Frame]]:
    """Seconds, and the frames that were looked at. Raises IsthmusError."""
    frames = list[Frame]()

    def report(frame: Frame) -> None:
        if frame.outcome != "filtered":
            frames.append(frame)
            seen()

    with EdgeAgent(config) as agent:
        camera = Camera(source, StreamConfig(fps=fps), report, threshold=None, stop=threading.Event())
        started_s = time.monotonic()
        camera.run(agent)
        seconds = time.monotonic() - started_s
    if camera.problem or not frames:
        raise IsthmusError(f"{source.name}: {camera.problem or 'no frame was read'}")
    return seconds, frames


def detections(frame: Frame) -> list[dict[str, Any]]:
    """None where the cloud did not answer: the bundle has no exit."""
    answers = (frame.answer or {}).get("answers", {})
    return [box for answer in answers.values() for box in answer["detections"]]


def boxes_of(frame: Frame) -> Boxes:
    """Of a frame's line of results."""
    found = detections(frame)
    boxes_M4 = np.array([each["box"] for each in found], np.float32).reshape(-1, 4)
    scores_M = np.array([each["score"] for each in found], np.float32)
    return Boxes(boxes_M4, scores_M, np.array([each["index"] for each in found], np.uint16))


def figures(run: Run, reference: Run) -> dict[str, Any]:
    """One row of the table."""
    sizes = [frame.answer["bytes_up"] for frame in run.frames if frame.answer]
    pairs = zip(reference.frames, run.frames, strict=True)
    same = [1 - unmatched(detections(wanted), detections(found)) for wanted, found in pairs]
    points = {(frame.answer or {})["route"]: (frame.answer or {}).get("rate") for frame in run.frames}
    return {
        "frames": len(run.frames),
        "unanswered": sum(frame.answer is None or frame.answer["degraded"] for frame in run.frames),
        "fps": len(run.frames) / run.seconds,
        "bytes_up_per_frame": float(np.mean(sizes)),
        "wire_bytes_up_per_frame": run.wire_bytes / len(run.frames),
        "map50": mean_average_precision(reference.boxes, run.boxes),
        "f1": float(np.mean(same)),
        "age_ms": float(np.median([1000 * frame.age_s for frame in run.frames])),
        "routes": points,
    }


def compared(
    source: Source, fps: float | None, spec: LinkSpec, progress: Progress, count: int
) -> tuple[dict[str, Any], dict[str, Run]]:
    """Rows by way, and the runs with the reference as "whole"."""
    bar = progress.add_task("the whole network", total=count * (len(WAYS) + 1))
    runs: dict[str, Run] = {}
    with ExitStack() as stack:
        cloud = stack.enter_context(CloudProcess(BUNDLE))
        seconds, frames = watch(source, replace(WHOLE, clouds=(cloud.target,)), fps, lambda: progress.advance(bar))
        runs["whole"] = Run(seconds, 0, frames)
        if any(frame.answer is None or frame.answer["degraded"] for frame in frames):
            raise IsthmusError("the whole network did not answer every frame on loopback")
        for name, config in WAYS.items():
            progress.update(bar, description=name)
            proxy = stack.enter_context(LinkProxy(cloud.port, spec))
            linked = replace(config, clouds=(f"127.0.0.1:{proxy.port}",))
            seconds, frames = watch(source, linked, fps, lambda: progress.advance(bar))
            runs[name] = Run(seconds, proxy.up.bytes, frames)
    return {name: figures(runs[name], runs["whole"]) for name in WAYS}, runs


def length(source: Source) -> tuple[float, int]:
    """Seconds and frames of a video file. Raises IsthmusError."""
    times = [shot.at_s for shot in source.shots()]
    return max(times, default=0.0), len(times)


def table(result: dict[str, Any]) -> Table:
    link = result["link"]
    made = Table(
        title=f"{result['frames']} frames of {result['clip']}, {link['kbit']:g} kbit/s, {link['rtt_ms']:g} ms round"
        " trip; boxes against the whole network's"
    )
    made.add_column("way")
    for column in ("B/frame", "wire B/frame", "mAP at 0.5", "F1", "unanswered", "frames/s", "median age ms"):
        made.add_column(column, justify="right")
    for name, row in result["ways"].items():
        made.add_row(
            name,
            f"{row['bytes_up_per_frame']:.0f}",
            f"{row['wire_bytes_up_per_frame']:.0f}",
            f"{row['map50']:.3f}",
            f"{row['f1']:.3f}",
            f"{row['unanswered']}",
            f"{row['fps']:.2f}",
            f"{row['age_ms']:.0f}",
        )
    return made


def demo(clip: Path, count: int, spec: LinkSpec, console: Console) -> tuple[dict[str, Any], dict[str, Run], Source]:
    """The whole comparison, as `--json` writes it; the runs, and what was watched."""
    source = parse_source(str(clip))
    seconds, whole = length(source)
    fps = count / seconds if whole > count and seconds else None
    with Progress(console=console, transient=True) as progress:
        rows, runs = compared(source, fps, spec, progress, min(count, whole))
    result = {
        "clip": clip.name,
        "frames": len(runs["whole"].frames),
        "link": {"kbit": (spec.rate_bps or 0) / 1000, "rtt_ms": 1000 * spec.rtt_s},
        "boxes": sum(len(boxes) for boxes in runs["whole"].boxes),
        "ways": rows,
    }
    return result, runs, source


@click.command(epilog="Example: python -m tests.bench.demo_video --clip clip.mp4 --frames 40 --kbit 512")
@click.option("--clip", type=click.Path(path_type=Path, exists=True), help="Without it: one that a package carries.")
@click.option("--frames", default=40, show_default=True, type=click.IntRange(2, 5000), help="Spread over the clip.")
@click.option("--kbit", default=512.0, show_default=True, type=click.FloatRange(0), help="Link rate; 0: unlimited.")
@click.option("--rtt-ms", default=100.0, show_default=True, type=click.FloatRange(0, 10_000))
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write all figures here.")
@click.option("--plot", "plot_path", type=click.Path(path_type=Path), help="Write the picture here (PNG).")
def main(
    clip: Path | None, frames: int, kbit: float, rtt_ms: float, json_path: Path | None, plot_path: Path | None
) -> None:
    """Compare ways to answer the frames of a clip over an emulated thin link."""
    console = Console(stderr=True)
    try:
        result, runs, source = demo(
            clip or fetched_clip(), frames, LinkSpec(kbit * 1e3 or None, rtt_ms / 1000), console
        )
    except (IsthmusError, RuntimeError) as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(1)
    Console(width=150 if not sys.stdout.isatty() else None).print(table(result))
    if json_path:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        click.echo(f"figures: {json_path}")
    if plot_path:
        plot(result, {name: run.frames for name, run in runs.items()}, source, plot_path)
        click.echo(f"picture: {plot_path}")


if __name__ == "__main__":
    main()
