"""The picture of the demo of a clip: one frame with the boxes of two ways, and bars of bytes, precision and speed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from isthmus.edge_agent.streams.frames import Frame
from isthmus.edge_agent.streams.sinks.pictures import annotated
from isthmus.edge_agent.streams.sources import Source

COLOURS = ("tab:orange", "tab:blue", "tab:cyan", "tab:green")
BARS = (
    ("bytes_up_per_frame", "bytes sent per frame", "{:,.0f}"),
    ("map50", "mean average precision at an overlap of 0.5", "{:.2f}"),
    ("fps", "frames answered a second", "{:.1f}"),
)


def plot(result: Mapping[str, Any], runs: Mapping[str, Sequence[Frame]], source: Source, path: Path) -> None:
    """`runs`: the frames of each way, and of the whole network."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(result["ways"])
    figure = pyplot.figure(figsize=(11, 7.2), layout="constrained")
    grid = figure.add_gridspec(2, 6, height_ratios=(1.7, 1))
    chosen = busiest(runs["whole"])
    image = image_of(source, runs["whole"][chosen].index)
    shown = (("whole", "the whole network, frame sent without loss"), (names[1], f"{names[1]}: "))
    for column, (name, title) in enumerate(shown):
        frame = runs[name][chosen]
        axes = figure.add_subplot(grid[0, 3 * column : 3 * column + 3])
        axes.imshow(annotated(image, (frame.answer or {}).get("answers", {})))
        size = (frame.answer or {})["bytes_up"]
        axes.set_title(f"{title.rstrip(': ')}: {size:,} B", fontsize=10)
        axes.axis("off")
    for column, (key, title, form) in enumerate(BARS):
        axes = figure.add_subplot(grid[1, 2 * column : 2 * column + 2])
        values = [result["ways"][name][key] for name in names]
        bars = axes.barh(names[::-1], values[::-1], color=COLOURS[: len(names)][::-1])
        axes.bar_label(bars, [form.format(value) for value in values[::-1]], padding=3, fontsize=9)
        axes.set_title(title, fontsize=10)
        axes.set_xlim(0, 1.25 * max(values))
        axes.tick_params(labelleft=column == 0, labelsize=8)
    link = result["link"]
    figure.suptitle(
        f"{result['frames']} frames of {result['clip']} over {link['kbit']:g} kbit/s, {link['rtt_ms']:g} ms round trip"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def busiest(frames: Sequence[Frame]) -> int:
    """The frame with the most boxes."""
    counts = [
        sum(len(each["detections"]) for each in (frame.answer or {}).get("answers", {}).values()) for frame in frames
    ]
    return counts.index(max(counts))


def image_of(source: Source, index: int) -> Image.Image:
    """A frame of the clip, read again. Raises IsthmusError."""
    return next(shot.decode() for number, shot in enumerate(source.shots()) if number == index)
