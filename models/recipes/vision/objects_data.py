"""Unlabelled photographs for a detector: whole ones and parts of them, padded to the network's square."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich.progress import track

from isthmus.models.errors import InvalidInput
from isthmus.models.recipes.common import debian
from isthmus.models.recipes.vision.nanodet import MEAN, SIDE
from isthmus.models.recipes.vision.photos_data import SUFFIXES, largest
from isthmus.models.recipes.vision.views import Views, draw_views

PACKAGES = (
    "gnome-backgrounds",
    "lomiri-wallpapers-20.04",
    "mate-backgrounds",
    "plasma-workspace-wallpapers",
    "ukui-wallpapers",
)
VIEWS = 3  # of a photograph: the whole one, and two parts of it, each mirrored half of the times
HELD_OUT = 5  # one photograph of so many is for scores
SMALLEST = 0.5  # part, as a share of each side
LEAST_SIDE = 100  # pixels
PADDING = tuple(round(255 * value) for value in MEAN)

Pixels = NDArray[np.uint8]


def fetch(folder: Path) -> None:
    """PACKAGES below `folder`. Raises InvalidInput when one cannot be downloaded."""
    for package in PACKAGES:
        debian.fetch(package, folder)


def photographs(folder: Path) -> tuple[list[Path], list[Path]]:
    """Those to train on and those held out for scores. Raises InvalidInput when there are too few."""
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and is_photograph(path))
    if len(found) < HELD_OUT:
        raise InvalidInput(f"{folder} holds {len(found)} photographs, expected {HELD_OUT} or more")
    return [p for i, p in enumerate(found) if i % HELD_OUT], found[::HELD_OUT]


def more(folder: Path) -> list[Path]:
    """Every photograph below a folder of packages; of a wallpaper in several sizes the largest."""
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    return [path for path in found if is_photograph(path) and largest(path)]


def is_photograph(path: Path) -> bool:
    """Whether the file is an opaque image of LEAST_SIDE pixels a side or more."""
    if not path.is_file() or path.is_symlink():
        return False
    try:
        with Image.open(path) as image:
            return min(image.size) >= LEAST_SIDE and not image.has_transparency_data
    except (OSError, ValueError, Image.DecompressionBombError):
        return False


def scaled(image: Image.Image) -> Image.Image:
    """RGB, its longer side SIDE pixels."""
    scale = SIDE / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    return image.convert("RGB").resize((width, height), Image.Resampling.BILINEAR, reducing_gap=3.0)


def padded(image: Image.Image) -> Pixels:
    """A scaled image in the middle of the square, shape (SIDE, SIDE, 3)."""
    canvas = Image.new("RGB", (SIDE, SIDE), PADDING)
    canvas.paste(image, ((SIDE - image.width) // 2, (SIDE - image.height) // 2))
    return np.array(canvas)


def opened(path: Path) -> Image.Image:
    """A scaled photograph; a large JPEG is decoded at a reduced size."""
    with Image.open(path) as image:
        image.draft("RGB", (2 * SIDE, 2 * SIDE))
        return scaled(image)


def draw(folder: Path, paths: Sequence[Path], seed: int) -> Views:
    """VIEWS views of every photograph."""

    def rows() -> Iterator[Pixels]:
        for row, path in enumerate(track(paths, "drawing")):
            generator = np.random.default_rng((seed, row))
            with Image.open(path) as opened_image:
                opened_image.draft("RGB", (3 * SIDE, 3 * SIDE))
                image = opened_image.convert("RGB")
            views = [image, *(part(image, generator) for _ in range(VIEWS - 1))]
            yield np.stack([padded(mirrored(scaled(view), generator)) for view in views]).transpose(0, 3, 1, 2)

    return draw_views(folder, len(paths), (3, SIDE, SIDE), rows(), VIEWS)


def part(image: Image.Image, generator: np.random.Generator) -> Image.Image:
    """A random part."""
    width, height = (max(1, int(side * generator.uniform(SMALLEST, 1))) for side in image.size)
    left, top = int(generator.integers(image.width - width + 1)), int(generator.integers(image.height - height + 1))
    return image.crop((left, top, left + width, top + height))


def mirrored(image: Image.Image, generator: np.random.Generator) -> Image.Image:
    """Mirrored half of the times."""
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if generator.random() < 0.5 else image
