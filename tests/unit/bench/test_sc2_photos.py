from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from isthmus.models.errors import InvalidInput
from isthmus.models.recipes.vision.elpv_data import load
from isthmus.models.recipes.vision.own_data import Images
from tests.bench import sc2_photos
from tests.bench.sc2_photos import photos_of, square


def test_cells_are_elpv_s_test_part() -> None:
    photos, part = photos_of("defect", None), load("test")
    assert np.array_equal(photos.labels_N, part.labels_N)
    assert np.array_equal(np.asarray(photos.image(5).convert("L")), part.images_NHW[5])


def test_objects_are_the_middles_of_labelled_photos(tmp_path: Path) -> None:
    for label in range(5):
        Image.new("RGB", (60 + label, 40), (label, 0, 0)).save(tmp_path / f"{label:03}_thing.png")
    photos = photos_of("object", tmp_path)
    assert photos.labels_N.tolist() == [0, 1, 2]
    assert photos.image(2).size == (40, 40) and photos.image(2).getpixel((3, 3)) == (2, 0, 0)


def test_garments_are_fashion_mnist_s(monkeypatch: pytest.MonkeyPatch) -> None:
    part = Images(np.arange(2 * 3 * 4 * 4, dtype=np.uint8).reshape(2, 3, 4, 4), np.array([7, 1]))
    monkeypatch.setattr(sc2_photos.fashion, "load", lambda folder: {"test": part})
    photos = photos_of("garment", None)
    assert photos.labels_N.tolist() == [7, 1]
    assert np.array_equal(np.asarray(photos.image(1)).transpose(2, 0, 1), part.images_N3HW[1])


def test_what_has_no_photos_is_refused() -> None:
    with pytest.raises(InvalidInput, match="no test photos for the task 'colour'"):
        photos_of("colour", None)
    with pytest.raises(InvalidInput, match="--labelled is missing"):
        photos_of("object", None)


def test_a_square_is_the_middle() -> None:
    pixels_HW = np.arange(12, dtype=np.uint8).reshape(2, 6)
    assert np.asarray(square(Image.fromarray(pixels_HW))).tolist() == [[2, 3], [8, 9]]
