"""Whole photos as JPEG, WebP and AVIF files: the baseline that needs no training, made as strong as it gets.

Knows nothing of networks. Quality alone cannot reach the sizes that bottlenecks work at; so each codec comes with fewer
pixels too (`q30@150`: the shorter side shrunk to 150 before coding), and its curve takes the best of all. Grey photos
are stored grey, as the agent does. Unlike the agent, JPEG gets Huffman tables of its own (at low quality the standard
ones are most of the file) and WebP its slowest search. AVIF's is left at its default: a slow one takes twenty times the
time and saves 5 % of the bytes.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

from PIL import Image

from isthmus.models.vision.images import is_grey, open_image, shrink

OPTIONS: dict[str, dict[str, Any]] = {
    "jpeg": {"optimize": True},
    "webp": {"method": 6},
    "avif": {},
    "png": {"optimize": True},
}
CODECS = ("jpeg", "webp", "avif")
# Qualities by the share of the side that the bundle takes. A wider search on the test photos left these: what is best
# at some size, and the qualities that the agent uses.
LADDERS: dict[str, dict[float, tuple[int, ...]]] = {
    "jpeg": {1: (50, 60, 75, 90), 2 / 3: (50, 75), 1 / 2: (20, 30, 50, 75), 1 / 3: (20, 50)},
    "webp": {1: (75, 82, 86, 90), 2 / 3: (90,), 1 / 2: (5, 10, 30, 50, 75, 90), 1 / 3: (1, 20, 50)},
    "avif": {1: (30, 40, 50, 55, 60, 75, 90), 2 / 3: (50, 60), 1 / 2: (30, 40, 50, 60, 75), 1 / 3: (40, 50)},
}
# Photos in colour need coarser ones too before they are as small.
COARSE: dict[str, dict[float, tuple[int, ...]]] = {
    "jpeg": {1: (5, 10, 20, 30), 2 / 3: (10, 20, 30), 1 / 2: (10,), 1 / 3: (75,)},
    "webp": {1: (1, 10, 30, 50), 2 / 3: (1, 10, 30, 50, 75), 1 / 3: (75, 90)},
    "avif": {1: (10, 20), 2 / 3: (20, 30, 40, 70), 1 / 2: (20,), 1 / 3: (60, 75)},
}


@dataclass(frozen=True)
class ImageCodec:
    """One codec at one quality; `pixels`: the shorter side is shrunk to at most so many first, None for no change."""

    form: str
    quality: int
    pixels: int | None = None

    def encode(self, image: Image.Image) -> bytes:
        """RGB photo -> file."""
        small = shrink(image, self.pixels) if self.pixels else image
        buffer = io.BytesIO()
        stored = small.convert("L") if is_grey(small) else small
        stored.save(buffer, self.form.upper(), quality=self.quality, **OPTIONS[self.form])
        return buffer.getvalue()

    def decode(self, data: bytes) -> Image.Image:
        """File -> RGB photo, still small. AVIF is no format of the product's, which opens the others."""
        if self.form != "avif":
            return open_image(data)
        with Image.open(io.BytesIO(data), formats=("AVIF",)) as image:
            return image.convert("RGB")


def ladder(form: str, full: int, *, coarse: bool = False) -> list[tuple[str, ImageCodec]]:
    """Every setting of a codec for a bundle that takes `full` pixels, with its name; `coarse` adds those of COARSE."""
    named = []
    for share, qualities in LADDERS[form].items():
        pixels = round(full * share)
        suffix = "" if share == 1 else f"@{pixels}"
        for quality in sorted({*qualities, *(COARSE[form].get(share, ()) if coarse else ())}):
            named.append((f"q{quality}{suffix}", ImageCodec(form, quality, pixels)))
    return named
