from __future__ import annotations

import pytest
import torch
from torch import nn

from isthmus.models.vision.catalog import BUILDERS
from tests.conftest import TINY


@pytest.mark.parametrize("name", BUILDERS)
def test_every_builder_gives_a_network_that_can_be_cut(name: str) -> None:
    with torch.device("meta"):
        split = BUILDERS[name](TINY.model_copy(update={"builder": name}))
        images_B3HW = torch.zeros(1, 3, 64, 64)
        assert isinstance(split, nn.Module)
        features_BCHW = split.trunk(images_B3HW)
        answers = [split.answer(features_BCHW, task).shape for task in range(len(TINY.classes))]
        assert answers == [(1, classes) for classes in TINY.classes]
        assert len(split.exits) == len(TINY.cuts)
        for index, (tap, built) in enumerate(zip(split.taps, TINY.taps, strict=True)):
            latent_BCHW = tap.encoder(features_BCHW if built.after else images_B3HW)
            rate_B = torch.zeros(1, dtype=torch.long)
            assert split.decode(index, latent_BCHW, rate_B).shape == features_BCHW.shape
