"""A small classifier of somebody's own, and factories that fail."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from isthmus.models.vision.manifest import Preprocessing

SIDE = 32
SPEC = Preprocessing(resize=SIDE, crop=(SIDE, SIDE), mean=(0.5,) * 3, deviation=(0.5,) * 3)


class Own(nn.Module):
    """Somebody's network: which of two shades an image has."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(inplace=True))
        self.second = nn.Sequential(nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU(inplace=True))
        self.third = nn.Sequential(nn.Conv2d(16, 16, 3, 1, 1), nn.ReLU(inplace=True))
        self.classifier = nn.Linear(16, 2)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        logits_BK: Tensor = self.classifier(self.third(self.second(self.first(x_BCHW))).mean((2, 3)))
        return logits_BK


def factory() -> nn.Module:
    torch.manual_seed(0)
    return Own()


def broken() -> nn.Module:
    raise RuntimeError("no weights here")


def nothing() -> str:
    return "a word"
