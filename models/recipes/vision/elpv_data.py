"""ELPV: 2,624 photographs of solar cells, in three fixed parts by a hash of the file name.

Buerhop-Lutz et al., "A Benchmark for Visual Identification of Defective Solar Cells in Electroluminescence Imagery"
(EU PVSEC 2018); CC BY-NC-SA 4.0. The PyPI package `elpv-dataset` contains the photographs.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Part = Literal["train", "calibration", "test"]
SPLIT_SALT = "isthmus/elpv/1:"
DEFECTIVE_FROM = 0.5  # annotators' probability of a defect


@dataclass(frozen=True)
class Photos:
    """One part: `images_NHW` uint8 300x300, `defect_N` float32 in [0, 1], `poly_N` whether polycrystalline."""

    paths: tuple[Path, ...]
    images_NHW: NDArray[np.uint8]
    defect_N: NDArray[np.float32]
    poly_N: NDArray[np.bool_]

    @property
    def labels_N(self) -> NDArray[np.int64]:
        """Class of the task `defect`: 0 functional, 1 defective."""
        return (self.defect_N >= DEFECTIVE_FROM).astype(np.int64)

    @property
    def cell_types_N(self) -> NDArray[np.int64]:
        """Class of the task `cell_type`: 0 monocrystalline, 1 polycrystalline."""
        return self.poly_N.astype(np.int64)

    def __len__(self) -> int:
        return len(self.paths)


def part_of(name: str) -> Part:
    """The part of a photograph: 60 % train, 20 % calibration, 20 % test, by SHA-256 of its name."""
    bucket = int.from_bytes(hashlib.sha256((SPLIT_SALT + name).encode()).digest()[:8], "big") % 100
    if bucket < 60:
        return "train"
    return "calibration" if bucket < 80 else "test"


def load(part: Part) -> Photos:
    """All photographs of one part, in the order of the data set's list."""
    root = Path(str(files("elpv_dataset"))) / "data"
    with (root / "labels.csv").open(encoding="utf-8") as lines:
        rows = [line.split() for line in lines if line.strip()]
    chosen = [(root / name, float(probability), kind) for name, probability, kind in rows if part_of(name) == part]
    images = []
    for path, *_ in chosen:
        with Image.open(path) as image:
            images.append(np.asarray(image.convert("L")))
    return Photos(
        paths=tuple(path for path, *_ in chosen),
        images_NHW=np.stack(images),
        defect_N=np.array([probability for _, probability, _ in chosen], dtype=np.float32),
        poly_N=np.array([kind == "poly" for *_, kind in chosen]),
    )
