"""Every graph of a bundle run a few times before the first photo, so that the estimates start from the truth."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from isthmus.edge_agent.policy.exits import OperatingPoint
from isthmus.edge_agent.vision.costs import Costs
from isthmus.models.codecs.checkerboard import ContextualCodec
from isthmus.models.errors import PayloadTooLarge
from isthmus.models.vision.head import Head

Floats = NDArray[np.float32]


def warm_up(head: Head, codecs: Sequence[ContextualCodec], costs: Costs, blank_CHW: Floats) -> None:
    """Segments, and encoders with their codecs at every width, on a blank image.

    A graph's first run allocates its memory and says nothing about the others: it is not counted.
    """
    encoders = [point for point in costs.points.figures if point.rate == 0]
    for counts in (False, True, True):
        behind = [blank_CHW]  # so many segments
        for index, segment_s in enumerate(costs.segment_s):
            started_s = time.monotonic()
            behind.append(head.segment(index, behind[-1])[0])
            if counts:
                segment_s.calibrate(time.monotonic() - started_s)
        for point in encoders:
            started_s = time.monotonic()
            encode(head, codecs[point.tap], point, behind[costs.points.after(point)])
            if counts:
                costs.encode_s[point.tap][point.width].calibrate(time.monotonic() - started_s)


def encode(head: Head, codec: ContextualCodec, point: OperatingPoint, source_CHW: Floats) -> None:
    """For the sake of the time it takes."""
    with contextlib.suppress(PayloadTooLarge):
        codec.encode(codec.quantise(head.encode(point.tap, source_CHW, point.width), point.rate), point.rate)
