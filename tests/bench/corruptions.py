"""Corruptions of photos: four of those of ImageNet-C, at its strengths 1 to 5.

Hendrycks & Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations" (ICLR 2019),
written anew from the paper's definitions. Its blur is for photos with a side of 224 pixels; here the radius grows and
shrinks with the photo's shorter side, so that one strength takes the same detail from small photos and large ones.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

SIDE = 224  # pixels of the photos that the paper's blur is for
NOISE = (0.08, 0.12, 0.18, 0.26, 0.38)  # standard deviation, of values from 0 to 1
BLUR = (1.0, 2.0, 3.0, 4.0, 6.0)  # standard deviation of the Gaussian, pixels
CONTRAST = (0.4, 0.3, 0.2, 0.1, 0.05)  # of the distance to the mean of each channel, what is left
BRIGHTNESS = (0.1, 0.2, 0.3, 0.4, 0.5)  # what is added to HSV's value

Pixels = NDArray[np.float64]


def noise(photo: Image.Image, strength: int, random: np.random.Generator) -> Image.Image:
    """Independent Gaussian noise on each value."""
    values_HWC = as_values(photo)
    return as_photo(values_HWC + random.normal(0, NOISE[strength - 1], values_HWC.shape))


def blur(photo: Image.Image, strength: int, random: np.random.Generator) -> Image.Image:
    """A Gaussian blur."""
    return photo.filter(ImageFilter.GaussianBlur(BLUR[strength - 1] * min(photo.size) / SIDE))


def contrast(photo: Image.Image, strength: int, random: np.random.Generator) -> Image.Image:
    """Every value moves towards the mean of its channel."""
    values_HWC = as_values(photo)
    means_C = values_HWC.mean((0, 1))
    return as_photo(means_C + CONTRAST[strength - 1] * (values_HWC - means_C))


def brightness(photo: Image.Image, strength: int, random: np.random.Generator) -> Image.Image:
    """HSV's value grows; hue and saturation stay."""
    values_HWC = as_values(photo)
    value_HW1 = values_HWC.max(2, keepdims=True)
    grown_HW1 = np.minimum(value_HW1 + BRIGHTNESS[strength - 1], 1.0)
    scaled_HWC = values_HWC * grown_HW1 / np.maximum(value_HW1, 1e-9)
    return as_photo(np.where(value_HW1 > 0, scaled_HWC, grown_HW1))  # black has no hue, and becomes grey


CORRUPTIONS: dict[str, Callable[[Image.Image, int, np.random.Generator], Image.Image]] = {
    "blur": blur,
    "noise": noise,
    "contrast": contrast,
    "brightness": brightness,
}


def as_values(photo: Image.Image) -> Pixels:
    """RGB, 0 to 1."""
    return np.asarray(photo.convert("RGB"), np.float64) / 255


def as_photo(values_HWC: Pixels) -> Image.Image:
    """Values are clipped to 0 to 1."""
    return Image.fromarray(np.round(255 * values_HWC.clip(0, 1)).astype(np.uint8))
