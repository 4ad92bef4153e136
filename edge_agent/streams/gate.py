"""The change gate: how much a frame differs from the last one that was answered, and whether it takes that answer.

    frame -> luma, averaged to SIDE x SIDE -> minus mean, by standard deviation -> |difference| averaged by cell -> max

Averaging takes noise out, the normalisation a change of exposure (gain and offset); the maximum over cells keeps what
is small and local. Knows no answer and no clock.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SIDE = 48  # of the thumbnail
CELL = 4  # of its cells
FLAT = 8.0  # grey levels: the least standard deviation, so that noise of an even picture is not a change

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]


def thumbnail(image: Image.Image) -> Bytes:
    """Luma (SIDE, SIDE) of an RGB image, of whatever shape it is."""
    small = image.resize((SIDE, SIDE), Image.Resampling.BOX, reducing_gap=2.0)
    return np.asarray(small.convert("L"))


def change(one_HW: Floats, other_HW: Floats) -> float:
    """Difference of two normalised thumbnails in standard deviations of their luma; 0 for equal ones, symmetric."""
    difference_HW = np.abs(one_HW - other_HW)
    cells = SIDE // CELL
    return float(difference_HW.reshape(cells, CELL, cells, CELL).mean((1, 3)).max())


def normalised(thumbnail_HW: Bytes) -> Floats:
    """Without mean, by the standard deviation."""
    pixels_HW = thumbnail_HW.astype(np.float32)
    normalised_HW: Floats = (pixels_HW - pixels_HW.mean()) / max(float(pixels_HW.std()), FLAT)
    return normalised_HW


@dataclass
class ChangeGate:
    """One camera's. `threshold` None: no answer is reused. `most_s`: for how long one is."""

    threshold: float | None
    most_s: float
    reference: Floats | None = None  # normalised
    at_s: float = 0.0  # of the reference, in the time of the source

    def measure(self, thumbnail_HW: Bytes) -> float | None:
        """The change since the reference; None without one."""
        return None if self.reference is None else change(normalised(thumbnail_HW), self.reference)

    def reuses(self, change: float | None, at_s: float) -> bool:
        """Whether a frame of this time and change takes the reference's answer."""
        if self.threshold is None or change is None:
            return False
        return change < self.threshold and 0 <= at_s - self.at_s < self.most_s

    def refer(self, thumbnail_HW: Bytes, at_s: float) -> None:
        """This frame gets an answer of its own, which later ones may take."""
        self.reference, self.at_s = normalised(thumbnail_HW), at_s

    def forget(self) -> None:
        """The next frame gets an answer of its own."""
        self.reference = None
