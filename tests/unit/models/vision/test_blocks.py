from __future__ import annotations

import pytest
import torch
from torch import nn

from isthmus.models.vision.blocks import Blocks


@pytest.fixture
def network() -> Blocks:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3), nn.Flatten()]
    return Blocks(layers, [4, 4, 2])


@pytest.mark.parametrize("cut", range(5))
def test_any_cut_gives_head_and_tail_of_the_whole(network: Blocks, cut: int) -> None:
    images_B3HW = torch.randn(2, 3, 8, 8)
    whole_BK = network(images_B3HW)
    assert torch.equal(network.section(cut)(network.section(0, cut)(images_B3HW)), whole_BK)


def test_a_section_shares_its_weights(network: Blocks) -> None:
    assert next(network.section(2).parameters()) is network.blocks[2].weight
