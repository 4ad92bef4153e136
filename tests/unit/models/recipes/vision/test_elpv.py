from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from isthmus.models.recipes.vision import elpv
from isthmus.models.recipes.vision.elpv_cloud import PREPROCESSING
from isthmus.models.recipes.vision.elpv_data import Photos
from isthmus.models.vision.images import preprocess


@pytest.fixture(scope="module")
def photos() -> Photos:
    """Forty grey noise photographs."""
    rng = np.random.default_rng(0)
    defect_N = (np.arange(40) % 4 / 3).astype(np.float32)
    return Photos(
        (Path("none"),) * 40, rng.integers(0, 256, (40, 300, 300), dtype=np.uint8), defect_N, np.arange(40) % 2 == 1
    )


def test_measuring_sees_photos_as_the_device_preprocesses_them(photos: Photos) -> None:
    image = Image.fromarray(photos.images_NHW[3]).convert("RGB")
    np.testing.assert_allclose(elpv.samples(photos).images[3], preprocess(image, PREPROCESSING), atol=1e-5)
