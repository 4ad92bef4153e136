"""Runs every graph of a bundle a few times before the first photo, so that estimates start from measurements."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from isthmus.edge_agent.policy.exits import OperatingPoint
from isthmus.edge_agent.vision.costs import Costs
from isthmus.models.codecs.checkerboard import ContextualCodec
from isthmus.models.errors import PayloadTooLarge
from isthmus.models.vision.head import Head
from isthmus.models.vision.images import encode_image

Floats = NDArray[np.float32]
QUALITY = 75  # of the images that are encoded to measure the time


def warm_up(head: Head, codecs: Sequence[ContextualCodec], costs: Costs, blank_CHW: Floats) -> None:
    """Calibrate `costs` for every segment, and for every encoder with its codec at every width, on a blank image.

    Image formats are measured on noise over a ramp: a blank image would compress too quickly.

    The first run of a graph allocates its memory and is not representative: it is not recorded.
    """
    image = noisy_ramp(*blank_CHW.shape[1:])
    encoders = [point for point in costs.points.figures if point.rate == 0]
    for record in (False, True, True):
        features = [blank_CHW]  # after this number of segments
        for index, segment_s in enumerate(costs.segment_s):
            started_s = time.monotonic()
            features.append(head.segment(index, features[-1])[0])
            if record:
                segment_s.calibrate(time.monotonic() - started_s)
        for point in encoders:
            started_s = time.monotonic()
            encode(head, codecs[point.tap], point, features[costs.points.after(point)])
            if record:
                costs.encode_s[point.tap][point.width].calibrate(time.monotonic() - started_s)
        for form, encode_s in costs.image_encode_s.items():
            started_s = time.monotonic()
            encode_image(image, form, QUALITY)
            if record:
                encode_s.observe(time.monotonic() - started_s)


def noisy_ramp(height: int, width: int) -> Image.Image:
    """An RGB image about as detailed as a photo."""
    noise_HW3 = np.random.default_rng(0).integers(0, 56, (height, width, 3))
    return Image.fromarray((np.linspace(0, 199, width)[None, :, None] + noise_HW3).astype(np.uint8))


def encode(head: Head, codec: ContextualCodec, point: OperatingPoint, source_CHW: Floats) -> None:
    """Encode and discard; only the time matters."""
    with contextlib.suppress(PayloadTooLarge):
        codec.encode(codec.quantise(head.encode(point.tap, source_CHW, point.width), point.rate), point.rate)
