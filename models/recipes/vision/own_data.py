"""A folder of images -> arrays in three parts. Sub-folders are classes; without sub-folders there are no labels.

Sub-folders `train`, `val` and `test` are the parts, and have the classes below them.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich.progress import track

from isthmus.models.errors import InvalidInput
from isthmus.models.recipes.vision.measure import Samples
from isthmus.models.vision.images import FileFormat, encode_image, open_file, open_image, preprocess
from isthmus.models.vision.manifest import Preprocessing

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}
OTHERS = {".avif", ".bmp", ".gif", ".heic", ".heif", ".jp2", ".jxl", ".tif", ".tiff"}  # images that are not read
# Per cent, by a hash of the file's path. Of 2,000 images 500 are for calibration: half a point takes 460.
PARTS = {"train": 60, "calibration": 25, "test": 15}
SPLITS = {"train": "train", "training": "train"} | dict.fromkeys(("val", "valid", "validation"), "calibration")
SPLITS["test"] = "test"  # names of sub-folders that are parts, not classes
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
    """All images below a folder, and the names of its classes (none when there are no labels).

    splits: the parts that its sub-folders are, none when they are classes. notes: what was left out, for people.
    """

    root: Path
    paths: tuple[Path, ...]
    classes: tuple[str, ...]
    splits: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()

    def label(self, path: Path) -> int:
        """Class of an image."""
        return self.classes.index(path.relative_to(self.root).parts[1 if self.splits else 0])

    def part(self, path: Path) -> str:
        """Part of an image. Images of `val`, where there is no `test`, are divided into calibration and test."""
        relative = path.relative_to(self.root)
        named = SPLITS[relative.parts[0]] if self.splits else None
        if named == "train" or (named and len(self.splits) == len(PARTS)):
            return named
        return part_of(relative, tuple(PARTS)[1:] if named else tuple(PARTS))


def find(root: Path) -> Folder:
    """The images of a folder. Raises InvalidInput when there are none, or only some are labelled."""
    if not root.is_dir():
        raise InvalidInput(f"{root} is not a folder")
    paths, notes = walk(root)
    if not paths:
        more = f"; {', '.join(notes)}" if notes else ""
        raise InvalidInput(f"{root} holds no image ({', '.join(sorted(SUFFIXES))}){more}")
    first = {path.relative_to(root).parts[0] for path in paths if path.parent != root}
    splits = frozenset(SPLITS[name] for name in first if name in SPLITS)
    if not (first <= SPLITS.keys() and "train" in splits and len(splits) > 1):
        splits = frozenset()
    below = 1 if splits else 0
    classes = {steps[below] for path in paths if len(steps := path.relative_to(root).parts) > below + 1}
    loose = sum(len(path.relative_to(root).parts) <= below + 1 for path in paths)
    if loose and loose < len(paths):
        raise InvalidInput(f"{root} holds {loose} images beside its sub-folders: of which class are they?")
    if splits:
        notes.append(f"{', '.join(sorted(first))} are taken for parts of the data, not for classes")
    return Folder(root, tuple(paths), tuple(sorted(classes)), splits, tuple(notes))


def walk(root: Path) -> tuple[list[Path], list[str]]:
    """The images below a folder, sorted, through links to folders; and what was left out, in words."""
    paths: list[Path] = []
    hidden, others, broken, seen = 0, Counter[str](), 0, set[str]()
    for folder, names, files in os.walk(root, followlinks=True):
        if (real := os.path.realpath(folder)) in seen:  # a link to a folder above, or a second one to the same
            names.clear()
            continue
        seen.add(real)
        shown = [name for name in names if not is_hidden(name)]
        hidden += len(names) - len(shown)
        names[:] = sorted(shown)
        for path in (Path(folder, name) for name in files):
            suffix = path.suffix.lower()
            if suffix not in SUFFIXES | OTHERS:
                continue
            if is_hidden(path.name):
                hidden += 1
            elif suffix in OTHERS:
                others[suffix] += 1
            elif not path.is_file():
                broken += 1
            else:
                paths.append(path)
    notes = [f"{others.total()} images of other formats are left out ({', '.join(sorted(others))})"] if others else []
    notes += [f"{hidden} hidden files and folders are left out"] if hidden else []
    notes += [f"{broken} links to images lead nowhere"] if broken else []
    return sorted(paths), notes


def is_hidden(name: str) -> bool:
    """Whether a file or folder is some program's own: thumbnails, `._` files and `__MACOSX` of macOS."""
    return name.startswith(".") or name == "__MACOSX"


def part_of(path: Path, parts: tuple[str, ...] = tuple(PARTS)) -> str:
    """The part of an image, by its path in the folder only, independent of other images."""
    ends = np.cumsum([PARTS[part] for part in parts])
    bucket = int.from_bytes(hashlib.sha256(path.as_posix().encode()).digest()[:8], "big") % int(ends[-1])
    return parts[int(np.searchsorted(ends, bucket, side="right"))]


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
        chosen[folder.part(path)].append(path)
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


def samples(part: Images) -> Samples:
    """A part as it is measured: the files themselves, or the images where there are none."""
    files = [partial(open_file, path) for path in part.paths]
    pixels = [partial(Image.fromarray, image_3HW.transpose(1, 2, 0)) for image_3HW in part.images_N3HW]
    return Samples(files or pixels, () if part.labels_N is None else (part.labels_N,))


def recoded(image_3HW: NDArray[np.uint8], form: FileFormat, quality: int) -> tuple[bytes, NDArray[np.uint8]]:
    """An image as a file, and what is decoded from it."""
    file = encode_image(Image.fromarray(image_3HW.transpose(1, 2, 0)), form, quality)
    with Image.open(io.BytesIO(file)) as decoded:
        return file, np.asarray(decoded.convert("RGB")).transpose(2, 0, 1)


def jpeg_bytes(images_N3HW: NDArray[np.uint8], quality: int = 75) -> float:
    """Mean size of the images as JPEG files."""
    return float(np.mean([len(recoded(image_3HW, "jpeg", quality)[0]) for image_3HW in images_N3HW]))
