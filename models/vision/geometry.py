"""Where a photo lies in a network's input, and the way back: pixels of the network -> pixels of the photo given.

    crop        shorter side scaled to `resize`, middle of it taken
    stretch     both sides scaled to the input's
    letterbox   the whole photo scaled to fit in, its middle on the input's, the rest filled

The photo is upright: its EXIF orientation was applied before.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from isthmus.models.vision.detection.boxes import clip
from isthmus.models.vision.manifest import Fit

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Placement:
    """A photo scaled to `width` x `height`, its upper left corner at (`left`, `top`) of the network's input."""

    width: int
    height: int
    left: int
    top: int


def placement(fit: Fit, resize: int, crop: tuple[int, int], size: tuple[int, int]) -> Placement:
    """Of a photo of `size` (width, height) in an input of `crop` (height, width)."""
    height, width = crop
    if fit == "stretch":
        return Placement(width, height, 0, 0)
    if fit == "letterbox":
        scale = min(width / size[0], height / size[1])
        scaled_width, scaled_height = max(1, round(size[0] * scale)), max(1, round(size[1] * scale))
    else:
        scale = resize / min(size)
        scaled_width, scaled_height = (max(resize, round(side * scale)) for side in size)
        return Placement(scaled_width, scaled_height, -((scaled_width - width) // 2), -((scaled_height - height) // 2))
    return Placement(scaled_width, scaled_height, (width - scaled_width) // 2, (height - scaled_height) // 2)


@dataclass(frozen=True, slots=True)
class Geometry:
    """From pixels of a network's input to those of a photo of `width` x `height`, as it was given."""

    placement: Placement
    width: int
    height: int

    @property
    def scale(self) -> tuple[float, float]:
        """Photo pixels of a pixel of the input, across and down."""
        return self.width / self.placement.width, self.height / self.placement.height

    def points(self, points_N2: NDArray[np.float64]) -> NDArray[np.float64]:
        """Points (x, y) of the input -> of the photo; those of borders and of what was cropped away lie outside."""
        corner_2, scale_2 = np.array([self.placement.left, self.placement.top]), np.array(self.scale)
        found_N2: NDArray[np.float64] = (points_N2 - corner_2) * scale_2
        return found_N2

    def boxes(self, boxes_N4: Floats) -> Floats:
        """Boxes xyxy of the input -> of the photo, clipped to it."""
        corners_N4 = self.points(boxes_N4.astype(np.float64).reshape(-1, 2)).reshape(-1, 4)
        return clip(corners_N4.astype(np.float32), self.width, self.height)
