"""Draws answers on photos with Pillow's own font. Knows nothing about tasks."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

Colour = tuple[int, int, int]

TURN = 0.618034  # of the hue from one class to the next: neighbours differ most (golden ratio)
OPACITY = 0.45  # of a mask
LEAST_TEXT, TEXT_SHARE = 10, 32  # pixels; of the photo's shorter side, one in so many


def colour(index: int) -> Colour:
    """A class's own, always the same."""
    red, green, blue = colorsys.hsv_to_rgb(index * TURN % 1, 0.85, 0.95)
    return round(255 * red), round(255 * green), round(255 * blue)


def caption(image: Image.Image, words: str) -> Image.Image:
    """The image with words in its upper left corner."""
    drawn = image.copy()
    label(ImageDraw.Draw(drawn), (0, 0), words, colour(0), font_of(image))
    return drawn


def boxes(
    image: Image.Image, boxes_M4: NDArray[Any], words: Sequence[str], classes: Sequence[int] | NDArray[Any]
) -> Image.Image:
    """The image with boxes in its pixels, each with its words; the first is drawn last."""
    drawn, font = image.copy(), font_of(image)
    pen, width = ImageDraw.Draw(drawn), max(2, min(image.size) // 200)
    for box_4, text, index in reversed(list(zip(boxes_M4.tolist(), words, classes, strict=True))):
        pen.rectangle(box_4, outline=colour(int(index)), width=width)
        label(pen, (box_4[0], max(0.0, box_4[1] - font.size - 4)), text, colour(int(index)), font)
    return drawn


def mask(image: Image.Image, mask_HW: NDArray[np.uint16], classes: int) -> Image.Image:
    """The image with the colours of the classes below `classes` over it."""
    palette_K3 = np.array([colour(index) for index in range(classes)] + [(0, 0, 0)], np.uint8)
    small_HW = np.asarray(Image.fromarray(mask_HW).resize(image.size, Image.Resampling.NEAREST))
    tint = Image.fromarray(palette_K3[np.minimum(small_HW, classes)])
    shown = Image.fromarray(((small_HW < classes) * round(255 * OPACITY)).astype(np.uint8))
    return Image.composite(tint, image, shown)


def label(
    pen: ImageDraw.ImageDraw, corner: tuple[float, float], words: str, fill: Colour, font: ImageFont.FreeTypeFont
) -> None:
    """Words on a ground of this colour."""
    text = (corner[0] + 2, corner[1] + 1)
    pen.rectangle(pen.textbbox(text, words, font=font), fill=fill)
    pen.text(text, words, fill="black" if sum(fill) > 380 else "white", font=font)


def font_of(image: Image.Image) -> ImageFont.FreeTypeFont:
    """Pillow's own, of a size for the image."""
    size = max(LEAST_TEXT, min(image.size) // TEXT_SHARE)
    font = ImageFont.load_default(size)
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise RuntimeError("Pillow is built without FreeType, which draws words")
    return font
