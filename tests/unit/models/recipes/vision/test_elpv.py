from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from isthmus.models.recipes.vision import elpv
from isthmus.models.recipes.vision.elpv_data import Photos


@pytest.fixture(scope="module")
def photos() -> Photos:
    """Forty grey noise photographs."""
    rng = np.random.default_rng(0)
    defect_N = (np.arange(40) % 4 / 3).astype(np.float32)
    return Photos(
        (Path("none"),) * 40, rng.integers(0, 256, (40, 300, 300), dtype=np.uint8), defect_N, np.arange(40) % 2 == 1
    )


def test_measuring_sees_photos_as_the_device_gets_them(photos: Photos, tmp_path: Path) -> None:
    image, file = Image.fromarray(photos.images_NHW[3]), tmp_path / "photo.png"
    image.save(file)
    one = Photos((file,), photos.images_NHW[3:4], photos.defect_N[3:4], photos.poly_N[3:4])
    (opened,) = elpv.samples(one).photos
    np.testing.assert_array_equal(np.asarray(opened()), np.asarray(image.convert("RGB")))
