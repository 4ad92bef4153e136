"""A folder of images -> arrays in three parts. Sub-folders are classes; without sub-folders there are no labels."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich.progress import track

from isthmus.models.errors import InvalidInput
from isthmus.models.recipes.vision.measure import Samples
from isthmus.models.vision.images import encode_image, open_image, preprocess
from isthmus.models.vision.manifest import Preprocessing

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}
PARTS = {"train": 60, "calibration": 20, "test": 20}  # per cent, by a hash of the file's name
LEAST = 20  # images in each part
MAX_BYTES = 8 << 30  # of all images, resized, in 8 bits


@dataclass(frozen=True)
class Images:
    """One part: images of the network's size in 8 bits, classes if labelled, paths if from files."""

    images_N3HW: NDArray[np.uint8]
    labels_N: NDArray[np.int64] | None
    paths: tuple[Path, ...] = ()

    def __len__(self) -> int:
        return len(self.images_N3HW)


@dataclass(frozen=True)
class Folder:
    """All images below a folder, and the names of its classes (none when there are no labels)."""

    root: Path
    paths: tuple[Path, ...]
    classes: tuple[str, ...]

    def label(self, path: Path) -> int:
        """Class of an image."""
        return self.classes.index(path.relative_to(self.root).parts[0])


def find(root: Path) -> Folder:
    """The images of a folder. Raises InvalidInput when there are none, or only some are labelled."""
    if not root.is_dir():
        raise InvalidInput(f"{root} is not a folder")
    paths = tuple(sorted(path for path in root.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file()))
    loose = [path for path in paths if path.parent == root]
    if not paths:
        raise InvalidInput(f"{root} holds no image ({', '.join(sorted(SUFFIXES))})")
    if loose and len(loose) < len(paths):
        raise InvalidInput(f"{root} holds {len(loose)} images beside its sub-folders: of which class are they?")
    return Folder(root, paths, () if loose else tuple(sorted({path.relative_to(root).parts[0] for path in paths})))


def part_of(path: Path) -> str:
    """The part of an image, by its name only, independent of other images."""
    bucket = int.from_bytes(hashlib.sha256(path.name.encode()).digest()[:8], "big") % 100
    ends = np.cumsum(list(PARTS.values()))
    return list(PARTS)[int(np.searchsorted(ends, bucket, side="right"))]


def load(folder: Folder, spec: Preprocessing) -> dict[str, Images]:
    """Every image, resized and cropped, by part.

    Raises InvalidInput when a part has fewer than LEAST images, all are more than MAX_BYTES, or one does not open.
    """
    height, width = spec.crop
    if (size := len(folder.paths) * 3 * height * width) > MAX_BYTES:
        raise InvalidInput(
            f"{len(folder.paths)} images of {height}x{width} pixels take {size / 1e9:.0f} GB of memory, at most"
            f" {MAX_BYTES / 1e9:.0f} are allowed: use fewer"
        )
    chosen: dict[str, list[Path]] = {part: [] for part in PARTS}
    for path in folder.paths:
        chosen[part_of(path)].append(path)
    for part, paths in chosen.items():
        if len(paths) < LEAST:
            raise InvalidInput(f"{len(folder.paths)} images leave {len(paths)} to the {part} part, {LEAST} are needed")
    found: dict[str, Images] = {}
    broken: list[Path] = []
    pixels = spec.model_copy(update={"mean": (0.0,) * 3, "deviation": (1 / 255,) * 3})
    for part, paths in chosen.items():
        images_N3HW = np.zeros((len(paths), 3, height, width), np.uint8)
        for index, path in enumerate(track(paths, f"reading, {part}")):
            try:
                images_N3HW[index] = np.rint(preprocess(open_image(path.read_bytes()), pixels))
            except (InvalidInput, OSError):
                broken.append(path)
        labels_N = np.array([folder.label(path) for path in paths], np.int64) if folder.classes else None
        found[part] = Images(images_N3HW, labels_N, tuple(paths))
    if broken:
        raise InvalidInput(f"{len(broken)} of {len(folder.paths)} images do not open, the first is {broken[0]}")
    return found


def normalise(images_N3HW: NDArray[np.uint8], spec: Preprocessing) -> NDArray[np.float32]:
    """Images of 8 bits -> network input."""
    mean, deviation = (np.array(x, np.float32)[:, None, None] for x in (spec.mean, spec.deviation))
    normal: NDArray[np.float32] = (images_N3HW.astype(np.float32) / 255 - mean) / deviation
    return normal


def samples(part: Images, labels_N: NDArray[np.int64], spec: Preprocessing) -> Samples:
    """A part as `export.write` takes it."""
    return Samples([normalise(image_3HW, spec) for image_3HW in part.images_N3HW], (labels_N,))


def jpeg_bytes(images_N3HW: NDArray[np.uint8], quality: int = 75) -> float:
    """Mean size of the images as JPEG files."""
    files = (encode_image(Image.fromarray(image_3HW.transpose(1, 2, 0)), "jpeg", quality) for image_3HW in images_N3HW)
    return float(np.mean([len(file) for file in files]))
