from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn

from isthmus.models.recipes.common.trainer import Run
from isthmus.models.recipes.vision.bottleneck import BottleneckModel
from isthmus.models.recipes.vision.distil import LossWeights
from isthmus.models.recipes.vision.heads import HeadTraining, train_head
from isthmus.models.recipes.vision.rates import Rates
from isthmus.models.recipes.vision.views import extend, make_views
from isthmus.models.vision.efficientnet_lite import EfficientNetLite
from isthmus.models.vision.split import DenseDecoder, ExitHead

CHANNELS = 112  # of EfficientNet-Lite0's features before block 12


class Narrow(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 1)

    def forward(self, x_BCHW: torch.Tensor, width: int) -> torch.Tensor:
        y_BCHW: torch.Tensor = self.conv(x_BCHW)
        return y_BCHW


def bottleneck() -> BottleneckModel:
    torch.manual_seed(0)
    tail = EfficientNetLite("efficientnet_lite0", 2).eval().blocks[12:]
    return BottleneckModel(Narrow(), Rates(4, (1.0, 0.1)), DenseDecoder(4, CHANNELS, 8, 2), tail, 0, LossWeights())


def test_a_head_learns_what_the_features_tell_and_the_bottleneck_stays(tmp_path: Path) -> None:
    """Bright photographs are of class 1."""
    class_N = np.arange(64) % 2
    images_NHW = (60 + 120 * class_N)[:, None, None] * np.ones((1, 8, 8))
    make_views(tmp_path / "views", images_NHW.astype(np.uint8), seed=0)
    views = extend(
        tmp_path / "views",
        "features",
        lambda grey_BHW: {
            "front": grey_BHW.unsqueeze(1).repeat(1, 2, 1, 1),
            "features": grey_BHW.unsqueeze(1).repeat(1, CHANNELS, 1, 1),
        },
    )
    module = bottleneck()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    run = Run(tmp_path, 0)
    train_head(run, "bright", ExitHead(CHANNELS, 2), module, views, class_N)
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert run.last_figures()["bright"]["right"] > 0.9


def test_half_of_a_batch_crosses_the_bottleneck() -> None:
    seen: list[torch.Tensor] = []
    module = HeadTraining(ExitHead(CHANNELS, 2), bottleneck()).train()
    module.head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    front, features = torch.rand(6, 2, 8, 8), torch.rand(6, CHANNELS, 8, 8)
    module.loss((front, features, torch.zeros(6, dtype=torch.long)))
    assert torch.equal(seen[0][3:], features[3:])
    assert not torch.equal(seen[0][:3], features[:3])
    assert not module.bottleneck.training
