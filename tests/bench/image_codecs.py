"""Whole photos as JPEG, WebP and AVIF files: the baseline that needs no training, as strong as possible.

Knows nothing about networks. Lower quality alone does not reach the sizes of bottlenecks; so each codec also runs with
fewer pixels (`q30@150`: the shorter side resized to 150 before coding), and its curve is the envelope of all settings.
Grey photos are stored grey, as by the agent. Unlike the agent, JPEG has optimised Huffman tables (at low quality the
standard ones are most of the file) and WebP its slowest search. AVIF has its default speed: a slow search takes twenty
times as long and saves 5 % of the bytes.
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
# Qualities by the share of the bundle's side in pixels: those that a wider search on the test photos found best at
# some size, and those that the agent uses.
LADDERS: dict[str, dict[float, tuple[int, ...]]] = {
    "jpeg": {1: (50, 60, 75, 90), 2 / 3: (50, 75), 1 / 2: (20, 30, 50, 75), 1 / 3: (20, 50)},
    "webp": {1: (75, 82, 86, 90), 2 / 3: (90,), 1 / 2: (5, 10, 30, 50, 75, 90), 1 / 3: (1, 20, 50)},
    "avif": {1: (30, 40, 50, 55, 60, 75, 90), 2 / 3: (50, 60), 1 / 2: (30, 40, 50, 60, 75), 1 / 3: (40, 50)},
}
# Colour photos need coarser ones too to reach the same sizes.
COARSE: dict[str, dict[float, tuple[int, ...]]] = {
    "jpeg": {1: (5, 10, 20, 30), 2 / 3: (10, 20, 30), 1 / 2: (10,), 1 / 3: (75,)},
    "webp": {1: (1, 10, 30, 50), 2 / 3: (1, 10, 30, 50, 75), 1 / 3: (75, 90)},
    "avif": {1: (10, 20), 2 / 3: (20, 30, 40, 70), 1 / 2: (20,), 1 / 3: (60, 75)},
}


@dataclass(frozen=True)
class ImageCodec:
    """One codec at one quality; `pixels`: the shorter side is first resized to at most this many (None: unchanged)."""

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
        """File -> RGB photo, not resized back. `open_image` does not accept AVIF."""
        if self.form != "avif":
            return open_image(data)
        with Image.open(io.BytesIO(data), formats=("AVIF",)) as image:
            return image.convert("RGB")


def ladder(form: str, full: int, *, coarse: bool = False) -> list[tuple[str, ImageCodec]]:
    """Every setting of a codec with its name, for a side of `full` pixels; `coarse` adds those of COARSE."""
    named = []
    for share, qualities in LADDERS[form].items():
        pixels = round(full * share)
        suffix = "" if share == 1 else f"@{pixels}"
        for quality in sorted({*qualities, *(COARSE[form].get(share, ()) if coarse else ())}):
            named.append((f"q{quality}{suffix}", ImageCodec(form, quality, pixels)))
    return named
