from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from isthmus.models.recipes.vision import elpv_cloud
from isthmus.models.recipes.vision.elpv_data import Photos
from isthmus.models.recipes.vision.views import BATCH
from isthmus.models.vision.images import preprocess


@pytest.fixture(scope="module")
def photos() -> Photos:
    """Forty grey noise photographs."""
    rng = np.random.default_rng(0)
    defect_N = (np.arange(40) % 4 / 3).astype(np.float32)
    return Photos(
        (Path("none"),) * 40, rng.integers(0, 256, (40, 300, 300), dtype=np.uint8), defect_N, np.arange(40) % 2 == 1
    )


def test_training_sees_photos_as_the_device_preprocesses_them(photos: Photos) -> None:
    image = Image.fromarray(photos.images_NHW[0]).convert("RGB")
    device_CHW = preprocess(image, elpv_cloud.PREPROCESSING)
    training_CHW = elpv_cloud.normalise(torch.from_numpy(photos.images_NHW[:1]).float() / 255)[0]
    np.testing.assert_allclose(training_CHW, device_CHW, atol=1e-5)


def test_batches_are_whole_and_of_the_requested_size(photos: Photos) -> None:
    found = list(elpv_cloud.batches(photos, 32, torch.Generator().manual_seed(0)))
    assert [batch.images_B3HW.shape for batch in found] == [(BATCH, 3, 32, 32)] * 2
    assert [batch.defect_B.shape for batch in found] == [(BATCH,)] * 2


def test_the_generator_decides_the_batches(photos: Photos) -> None:
    first, again, other = (
        next(elpv_cloud.batches(photos, 32, torch.Generator().manual_seed(seed))) for seed in (0, 0, 1)
    )
    assert torch.equal(first.images_B3HW, again.images_B3HW)
    assert not torch.equal(first.defect_B, other.defect_B)


def test_doubt_is_a_soft_target() -> None:
    logits_B2 = torch.tensor([[0.0, math.log(3.0)]])  # probabilities 1/4 and 3/4
    by_hand = -(2 / 3 * math.log(0.75) + 1 / 3 * math.log(0.25))
    assert elpv_cloud.soft_cross_entropy(logits_B2, torch.tensor([2 / 3])).item() == pytest.approx(by_hand)
