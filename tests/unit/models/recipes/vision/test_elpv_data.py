from __future__ import annotations

from collections import Counter
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest

from isthmus.models.recipes.vision.elpv_data import Photos, load, part_of


@pytest.fixture(scope="module")
def names() -> list[str]:
    lines = (Path(str(files("elpv_dataset"))) / "data" / "labels.csv").read_text(encoding="utf-8").splitlines()
    return [line.split()[0] for line in lines if line.strip()]


@pytest.fixture(scope="module")
def photos() -> Photos:
    return load("test")


def test_the_split_is_fixed_for_good(names: list[str]) -> None:
    assert Counter(map(part_of, names)) == {"train": 1524, "calibration": 558, "test": 542}


@pytest.mark.parametrize(
    ("part", "name"),
    [
        ("calibration", "images/cell0001.png"),
        ("train", "images/cell0003.png"),
        ("test", "images/cell0005.png"),
    ],
)
def test_a_photo_stays_in_its_part(part: str, name: str) -> None:
    assert part_of(name) == part


def test_the_fractions_are_60_20_20() -> None:
    counts = Counter(part_of(f"photo {index}") for index in range(20_000))
    for part, share in (("train", 0.6), ("calibration", 0.2), ("test", 0.2)):
        assert counts[part] / 20_000 == pytest.approx(share, abs=0.015)  # type: ignore[index]


def test_a_part_holds_its_own_photos_alone(photos: Photos, names: list[str]) -> None:
    loaded = [f"images/{path.name}" for path in photos.paths]
    assert loaded == [name for name in names if part_of(name) == "test"]


def test_photos_are_grey_squares_of_300(photos: Photos) -> None:
    assert (len(photos), photos.images_NHW.shape, photos.images_NHW.dtype) == (542, (542, 300, 300), np.uint8)


def test_labels_are_the_annotators_majority(photos: Photos) -> None:
    assert sorted({round(float(p), 2) for p in photos.defect_N}) == [0.0, 0.33, 0.67, 1.0]
    np.testing.assert_array_equal(photos.labels_N, photos.defect_N > 0.5)


def test_cell_types_are_one_crystal_or_many(photos: Photos) -> None:
    assert np.bincount(photos.cell_types_N).tolist() == [230, 312]
