"""Natural photographs: unlabelled ones to distil on, and labelled ones of ImageNet's classes to evaluate on.

The unlabelled ones come from Debian packages: wallpapers, animals, landscapes, objects with transparent background.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich.progress import track

from isthmus.models.errors import InvalidInput
from isthmus.models.recipes.common import debian
from isthmus.models.recipes.vision.views import VIEWS, Views, draw_views

PACKAGES = (
    "gcompris-qt-data",
    "gnome-backgrounds",
    "lomiri-wallpapers-20.04",
    "mate-backgrounds",
    "plasma-workspace-wallpapers",
    "tuxpaint-stamps-default",
    "ukui-wallpapers",
)
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
PARTS = ("test", "test", "test", "calibration", "train")  # of every five labelled photographs in order
LEAST_SIDE, LEAST_STAMP = 200, 100  # pixels
LARGE_SIDE, LARGE_ROWS = 1000, 3  # a photo with a shorter side of LARGE_SIDE gets LARGE_ROWS rows of views
LEAST_CONTRAST = 12.0  # standard deviation of 8-bit values; crops with less, as of empty sky, are avoided
NARROWEST = {True: 0.2, False: 0.5}  # smallest crop of a large photo and of others, as a share of the shorter side
LABELLED = re.compile(r"(\d{3})_")  # a file's name starts with its class

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Labelled:
    """Photographs with their classes."""

    paths: tuple[Path, ...]
    labels_N: NDArray[np.int64]


def labelled(folder: Path, part: str) -> Labelled:
    """One part of the photographs `012_anything.jpeg`. Raises InvalidInput when there are none."""
    paths = sorted(path for path in folder.glob("*") if path.suffix.lower() in SUFFIXES and LABELLED.match(path.name))
    if not paths:
        raise InvalidInput(f"{folder} holds no photograph whose name starts with its class, as in 012_house_finch.jpg")
    chosen = [path for index, path in enumerate(paths) if PARTS[index % len(PARTS)] == part]
    return Labelled(tuple(chosen), np.array([int(path.name[:3]) for path in chosen], np.int64))


def fetch(folder: Path) -> None:
    """PACKAGES below `folder`. Raises InvalidInput when one cannot be downloaded."""
    for package in PACKAGES:
        for pictures in debian.fetch(package, folder).rglob("*.rcc"):
            extract(pictures)
            pictures.unlink()


def extract(archive: Path) -> None:
    """Extract the WebP pictures of a Qt resource file into its folder."""
    data = archive.read_bytes()
    for index, match in enumerate(re.finditer(rb"RIFF(....)WEBP", data, re.DOTALL)):
        size = int.from_bytes(match[1], "little") + 8
        archive.with_name(f"{archive.stem}{index}.webp").write_bytes(data[match.start() : match.start() + size])


@dataclass(frozen=True)
class Sources:
    """Photographs, and objects with a transparent background."""

    photos: tuple[Path, ...]
    objects: tuple[Path, ...]

    @property
    def rows(self) -> tuple[Path, ...]:
        """The source of each row of the views: photographs first, since they become backgrounds of the objects."""
        return (*self.photos, *self.objects)


def find(folder: Path, more: Sequence[Path] = ()) -> Sources:
    """Every usable image below a folder, large photographs several times. Raises InvalidInput when there is none."""
    photos: list[Path] = []
    objects: list[Path] = []
    for path in [*sorted(folder.rglob("*")), *more]:
        if path.suffix.lower() not in SUFFIXES or not path.is_file() or path.is_symlink():
            continue
        try:
            with Image.open(path) as image:
                side, clear = min(image.size), image.has_transparency_data
        except (OSError, ValueError, Image.DecompressionBombError):
            continue
        if clear and side >= LEAST_STAMP:
            objects.append(path)
        elif not clear and side >= LEAST_SIDE and largest(path):
            photos += [path] * (LARGE_ROWS if side >= LARGE_SIDE else 1)
    if not photos:
        raise InvalidInput(f"{folder} holds no photograph of at least {LEAST_SIDE} pixels a side")
    return Sources(tuple(photos), tuple(objects))


def largest(path: Path) -> bool:
    """Whether a wallpaper's file is the largest of its sizes, as 1920x1200.jpg among 1280x1024.jpg and others."""

    def pixels(other: Path) -> int:
        size = re.fullmatch(r"(\d+)x(\d+)", other.stem)
        return int(size[1]) * int(size[2]) if size else 0

    return pixels(path) == max(pixels(other) for other in path.parent.iterdir()) if pixels(path) else True


def draw(folder: Path, sources: Sources, side: int, seed: int) -> Views:
    """VIEWS random crops of `side` pixels of every row of `sources`, objects on top of crops of photographs."""

    def views() -> Iterator[Pixels]:
        backgrounds: list[Pixels] = []
        for row, path in enumerate(track(sources.rows, "drawing")):
            generator = np.random.default_rng((seed, row))
            with Image.open(path) as image:
                if row < len(sources.photos):
                    drawn = crops(image.convert("RGB"), side, generator)
                    backgrounds.append(drawn[generator.integers(VIEWS)])
                else:
                    below = [backgrounds[i] for i in generator.integers(len(backgrounds), size=VIEWS)]
                    drawn = np.stack([paste(image.convert("RGBA"), each, generator) for each in below])
            yield drawn.transpose(0, 3, 1, 2)

    return draw_views(folder, len(sources.rows), (3, side, side), views())


def crops(image: Image.Image, side: int, generator: np.random.Generator) -> Pixels:
    """VIEWS random squares of a photograph, half of them mirrored, shape (VIEWS, side, side, 3)."""
    shorter = min(image.size)
    found: list[Pixels] = []
    for _ in range(4 * VIEWS):
        size = int(max(min(side, shorter), shorter * generator.uniform(NARROWEST[shorter >= LARGE_SIDE], 1)))
        left, top = (int(generator.integers(length - size + 1)) for length in image.size)
        box = (left, top, left + size, top + size)
        pixels = np.asarray(image.resize((side, side), Image.Resampling.BILINEAR, box, reducing_gap=2.0))
        found.append(pixels[:, ::-1] if generator.random() < 0.5 else pixels)
    found.sort(key=lambda pixels: pixels.std() < LEAST_CONTRAST)  # stable, so low-contrast crops come last
    return np.stack(found[:VIEWS])


def paste(object_: Image.Image, background_HW3: Pixels, generator: np.random.Generator) -> Pixels:
    """Paste an object, scaled to half to 1.1 of the width, at a random position on a background."""
    canvas = Image.fromarray(background_HW3)
    scale = generator.uniform(0.5, 1.1) * canvas.width / max(object_.size)
    width, height = (max(1, int(length * scale)) for length in object_.size)
    top = object_.resize((width, height), Image.Resampling.BICUBIC)
    corner = [int(generator.uniform(-0.1, 1.1) * (room - own)) for room, own in zip(canvas.size, top.size, strict=True)]
    canvas.paste(top, (corner[0], corner[1]), top)
    return np.asarray(canvas)
