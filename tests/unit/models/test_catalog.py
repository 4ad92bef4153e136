from __future__ import annotations

import pytest
import torch
from torch import nn

from models.catalog import BUILDERS
from tests.conftest import TINY


@pytest.mark.parametrize("name", BUILDERS)
def test_every_builder_gives_a_network_that_can_be_cut(name: str) -> None:
    with torch.device("meta"):
        split = BUILDERS[name](TINY.model_copy(update={"builder": name}))
        images_B3HW = torch.zeros(1, 3, 64, 64)
        assert isinstance(split, nn.Module)
        assert split.tail(split.trunk(images_B3HW)).shape == (1, TINY.classes)
        assert len(split.exits) == len(TINY.cuts)
