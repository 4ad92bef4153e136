from __future__ import annotations

import pytest
import torch

from isthmus.models.recipes.vision.imagenet import class_names, load_lite2
from isthmus.models.vision.efficientnet_lite import EfficientNetLite


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


def test_every_class_has_a_name_of_its_own() -> None:
    names = class_names()
    assert len(set(names)) == len(names) == 1000
    assert (names[0], names[134], names[517], names[999]) == (
        "tench",
        "crane (bird)",
        "crane (machine)",
        "toilet tissue",
    )
