"""Bytes of a detector's bottleneck against image codecs and coded feature frames, at equal mean average precision.

The reference is the whole network's own boxes on the photo as it is; nothing here is labelled. Each way is a list of
settings, coarse to fine; a way's bytes at a precision are between its two neighbouring settings in the logarithm.

    photo -> whole network -> boxes of score REFERENCE and more = the reference
          -> jpeg, webp, avif, x265 at a quality -> whole network -> boxes
          -> head -> latent -> entropy coder -> tail -> boxes                     `bottleneck`
                  -> latent -> tiled, x265   -> tail -> boxes                     `features x265`
"""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import click
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from isthmus.models.recipes.common.trainer import Run
from isthmus.models.recipes.vision import objects, objects_data
from isthmus.models.recipes.vision.average_precision import mean_average_precision
from isthmus.models.vision.detection.boxes import Boxes, suppress
from tests.bench import frame_codecs

REFERENCE, LEAST = 0.3, 0.05  # scores of the boxes that are expected, and of those that are ranked against them
NMS_IOU, MAX_BOXES = 0.6, 100
QUALITIES = {
    "jpeg": (5, 10, 15, 20, 30, 40, 50, 60, 75, 90),
    "webp": (1, 5, 10, 20, 35, 50, 65, 75, 90),
    "avif": (5, 10, 15, 20, 30, 40, 50, 60, 75, 90),
    "x265": (50, 46, 42, 38, 34, 30, 26, 20),
    "features x265": (45, 40, 35, 30, 25, 20, 15, 10),
}
QUICK = {name: (steps[1], steps[-2]) for name, steps in QUALITIES.items()}
OPTIONS: dict[str, dict[str, Any]] = {"jpeg": {"optimize": True}, "webp": {"method": 6}, "avif": {}}
LEVELS = (0.7, 0.8, 0.9, 0.95)  # of precision, at which bytes are compared
REPEATS = 20

Pixels = NDArray[np.uint8]


class Detector(Protocol):
    """A network, whole and split."""

    rates: int

    def whole(self, pixels_HW3: Pixels) -> objects.Candidates: ...
    def latent(self, pixels_HW3: Pixels) -> NDArray[np.float32]: ...
    def answer(self, latent_CHW: NDArray[np.float32], rate: int) -> objects.Candidates: ...
    def sent(self, latent_CHW: NDArray[np.float32], rate: int) -> tuple[bytes, objects.Candidates]: ...


@dataclass(frozen=True)
class Setting:
    """Mean bytes a photo, and precision against the whole network, of one setting of a way."""

    name: str
    mean_bytes: float
    precision: float


def boxes_of(found: objects.Candidates, least: float = LEAST) -> Boxes:
    """Candidates -> boxes, in pixels of the network's square."""
    side = objects.nanodet.SIDE
    return suppress(*found, (side, side), min_score=least, nms_iou=NMS_IOU, max_boxes=MAX_BOXES)


def coded(image: Image.Image, form: str, quality: int) -> tuple[int, Image.Image]:
    """Bytes of a photo as a file, and the photo that comes back."""
    if form == "x265":
        size, pixels = frame_codecs.picture(np.array(image), quality)
        return size, Image.fromarray(pixels)
    buffer = io.BytesIO()
    image.save(buffer, form.upper(), quality=quality, **OPTIONS[form])
    return buffer.tell(), Image.open(buffer).convert("RGB")


def measure(
    detector: Detector, photos: Sequence[Callable[[], Image.Image]], qualities: dict[str, tuple[int, ...]]
) -> dict[str, list[Setting]]:
    """Every way's settings, coarse to fine. `photos`: scaled to the network's longer side, without padding."""
    references: list[Boxes] = []
    answers: dict[tuple[str, str], list[Boxes]] = {}
    sizes: dict[tuple[str, str], list[int]] = {}

    def keep(way: str, setting: str, size: int, found: objects.Candidates) -> None:
        answers.setdefault((way, setting), []).append(boxes_of(found))
        sizes.setdefault((way, setting), []).append(size)

    for photo in photos:
        image = photo()
        pixels_HW3 = objects_data.padded(image)
        references.append(boxes_of(detector.whole(pixels_HW3), REFERENCE))
        latent_CHW = detector.latent(pixels_HW3)
        for rate in range(detector.rates):
            payload, found = detector.sent(latent_CHW, rate)
            keep("bottleneck", f"rate {rate}", len(payload), found)
        for form, steps in qualities.items():
            for quality in steps:
                if form == "features x265":
                    size, back_CHW = frame_codecs.features(latent_CHW, quality)
                    keep(form, f"crf {quality}", size, detector.answer(back_CHW, detector.rates - 1))
                else:
                    size, back = coded(image, form, quality)
                    keep(form, f"q{quality}", size, detector.whole(objects_data.padded(back)))
    ways: dict[str, list[Setting]] = {}
    for (way, setting), found_boxes in answers.items():
        precision = mean_average_precision(references, found_boxes)
        ways.setdefault(way, []).append(Setting(setting, float(np.mean(sizes[way, setting])), precision))
    return ways


def bytes_at(settings: Sequence[Setting], precision: float) -> float | None:
    """Bytes that a way takes for a precision; its least bytes where all settings reach it; None where none does."""
    ordered = sorted(settings, key=lambda each: each.mean_bytes)
    before: Setting | None = None
    for each in ordered:
        if each.precision >= precision:
            if before is None:
                return each.mean_bytes
            share = (precision - before.precision) / (each.precision - before.precision)
            return float(before.mean_bytes * (each.mean_bytes / before.mean_bytes) ** share)
        if before is None or each.precision > before.precision:
            before = each
    return None


def report(ways: dict[str, list[Setting]], photos: int) -> dict[str, Any]:
    """Settings, bytes at LEVELS, and what the bottleneck saves there."""
    at = {way: {f"{level:g}": bytes_at(settings, level) for level in LEVELS} for way, settings in ways.items()}
    saved = {
        way: {
            level: 1 - own / other if (own := at["bottleneck"][level]) and other else None
            for level, other in each.items()
        }
        for way, each in at.items()
        if way != "bottleneck"
    }
    settings = {way: [vars(each) for each in found] for way, found in ways.items()}
    return {"photos": photos, "settings": settings, "bytes_at_precision": at, "saved_by_bottleneck": saved}


def encoder_ms(module: torch.nn.Module, side: int, threads: int) -> float:
    """Median milliseconds of the device's part with ONNX Runtime, without the entropy coder."""
    from isthmus.models.onnx_session import open_session
    from isthmus.models.recipes.vision.graphs import onnx_bytes

    images_13HW = torch.zeros(1, 3, side, side)
    session = open_session(onnx_bytes(module, {"x": images_13HW}, outputs=1), f"encoder at {side}", threads)
    seconds = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        session.run(None, {"x": images_13HW.numpy()})
        seconds.append(time.perf_counter() - started)
    return 1000 * float(np.median(seconds[2:]))


@click.command()
@click.option("--photos", type=click.Path(path_type=Path, exists=True), required=True, help="As the recipe got them.")
@click.option("--work", type=click.Path(path_type=Path), default=Path("runs/objects"), show_default=True)
@click.option("--json", "out", type=click.Path(path_type=Path), help="File for the figures.")
@click.option("--quick", is_flag=True, help="Two photos, two settings of each way, no times.")
def main(photos: Path, work: Path, out: Path | None, quick: bool) -> None:
    """Measure the `objects` recipe's bottleneck on the photos that it held out."""
    detector, encoder = objects.trained(Run(work, 0, apart=True), photos)
    held_out = objects_data.photographs(photos)[1]
    chosen = held_out[:2] if quick else held_out
    ways = measure(detector, [partial(objects_data.opened, path) for path in chosen], QUICK if quick else QUALITIES)
    found = report(ways, len(chosen))
    if not quick:
        found["encoder_ms"] = {str(side): encoder_ms(encoder, side, 2) for side in (320, 416, 640)}
    click.echo(json.dumps(found, indent=1))
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
