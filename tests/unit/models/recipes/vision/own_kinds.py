"""Small networks of somebody's own that answer no class, and photos for them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from isthmus.models.recipes.vision.small_vit import Layer, Stem

SIDE = 32


def block(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, 2, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())


class Detector(nn.Module):
    """Two scales after a neck; each cell's candidate is a box around it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.deep = nn.Sequential(block(3, 8), block(8, 12)), block(12, 16)
        self.lateral = nn.Conv2d(16, 12, 1)
        self.heads = nn.ModuleList([nn.Conv2d(12, 6, 3, padding=1), nn.Conv2d(16, 6, 3, padding=1)])

    def neck(self, images_B3HW: Tensor) -> tuple[Tensor, Tensor]:
        fine_BCHW = self.stem(images_B3HW)
        coarse_BCHW = self.deep(fine_BCHW)
        return fine_BCHW + F.interpolate(self.lateral(coarse_BCHW), scale_factor=2.0), coarse_BCHW

    def forward(self, images_B3HW: Tensor) -> tuple[Tensor, Tensor]:
        rows = []
        for stride, head, map_BCHW in zip((4, 8), self.heads, self.neck(images_B3HW), strict=True):
            ticks = (torch.arange(SIDE // stride) + 0.5) * stride
            y, x = torch.meshgrid(ticks, ticks, indexing="ij")
            centres_N2 = torch.stack([x, y], 2).reshape(-1, 2)
            found_BND = head(map_BCHW).flatten(2).transpose(1, 2)
            sides_BN4 = 2 * stride * found_BND[..., :4].sigmoid()
            corners = [centres_N2 - sides_BN4[..., :2], centres_N2 + sides_BN4[..., 2:]]
            rows.append(torch.cat([*corners, found_BND[..., 4:].sigmoid()], 2))
        found_BND = torch.cat(rows, 1)
        return found_BND[..., :4], found_BND[..., 4:]


class Segmenter(nn.Module):
    """A small U: the fine map goes around the coarse one."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.deep = block(3, 8), block(8, 16)
        self.up, self.last = nn.Conv2d(16, 8, 1), nn.Conv2d(8, 3, 1)

    def forward(self, images_B3HW: Tensor) -> Tensor:
        fine_BCHW = self.down(images_B3HW)
        up_BCHW = F.interpolate(self.up(self.deep(fine_BCHW)), scale_factor=2.0)
        scores_BKHW: Tensor = self.last(fine_BCHW + up_BCHW)
        return scores_BKHW


class Embedder(nn.Module):
    """The mean of a transformer's tokens, of which the first belongs to no place."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first, self.second = Stem(SIDE, 12), Layer(12), Layer(12)
        self.token = nn.Parameter(torch.randn(1, 1, 12))
        self.out = nn.Linear(12, 8)

    def forward(self, images_B3HW: Tensor) -> Tensor:
        x_BND = self.stem(images_B3HW)
        x_BND = torch.cat([self.token.expand(x_BND.shape[0], -1, -1), x_BND], 1)
        vectors_BD: Tensor = self.out(self.second(self.first(x_BND)).mean(1))
        return vectors_BD


def make(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    net = kind()
    if not isinstance(net, Embedder):
        net.train()(torch.randn(16, 3, SIDE, SIDE))
    return net.half().float().eval()


def detector() -> nn.Module:
    return make(Detector)


def segmenter() -> nn.Module:
    return make(Segmenter)


def embedder() -> nn.Module:
    return make(Embedder)


def write_photos(root: Path, count: int = 140) -> Path:
    """Coloured rectangles on noise."""
    rng = np.random.default_rng(0)
    root.mkdir(exist_ok=True)
    for index in range(count):
        pixels = np.clip(rng.normal(110, 20, (SIDE, SIDE + 8, 3)), 0, 255)
        top, left = rng.integers(0, SIDE // 2, 2)
        pixels[top : top + 12, left : left + 14] = rng.integers(0, 256, 3)
        Image.fromarray(pixels.astype(np.uint8)).save(root / f"{index}.png")
    return root
