from __future__ import annotations

import pytest
import torch

from models.recipes.imagenet import load_lite2
from models.vision.efficientnet_lite import EfficientNetLite


def test_a_classifier_of_another_size_stays_as_it_is() -> None:
    torch.manual_seed(0)
    net = EfficientNetLite("efficientnet_lite2", classes=2)
    classifier, stem = net.blocks[-1].linear.weight.clone(), net.blocks[0][0].weight.clone()
    load_lite2(net)
    assert torch.equal(net.blocks[-1].linear.weight, classifier)
    assert not torch.equal(net.blocks[0][0].weight, stem)


def test_another_backbone_is_refused() -> None:
    with pytest.raises(ValueError, match="shape|shorter|longer"):
        load_lite2(EfficientNetLite("efficientnet_lite0", classes=1000))
