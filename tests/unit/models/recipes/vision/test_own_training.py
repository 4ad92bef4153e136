from __future__ import annotations

import numpy as np
import pytest
import torch

from isthmus.models.recipes.vision import own_data, own_model
from isthmus.models.recipes.vision.cutting import Captured, capture
from isthmus.models.recipes.vision.own_training import start
from isthmus.models.vision.split import SplitClassifier
from tests.unit.models.recipes.vision.own_nets import SIDE, SPEC, factory


@pytest.fixture(scope="module")
def captured() -> Captured:
    return capture(factory(), (3, SIDE, SIDE))


@torch.inference_mode(False)
def test_a_bottleneck_starts_as_the_way_there_and_back(captured: Captured) -> None:
    torch.manual_seed(0)
    split = SplitClassifier(
        own_model.architecture(captured, ("first",)), own_model.backbone(captured, ("first",))
    ).eval()
    images_N3HW = np.random.default_rng(0).integers(0, 256, (64, 3, SIDE, SIDE), dtype=np.uint8)
    start(split, own_data.Images(images_N3HW, None), SPEC)
    images_B3HW = torch.from_numpy(own_data.normalise(images_N3HW[:8], SPEC))
    with torch.no_grad():
        features_BCHW = split.trunk(images_B3HW)
        back_BCHW = split.decode(0, split.tap(0).encoder(features_BCHW), torch.zeros(8, dtype=torch.long))
    torch.testing.assert_close(back_BCHW, features_BCHW, rtol=1e-2, atol=1e-2)  # as many latents as channels
