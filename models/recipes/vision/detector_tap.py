"""The bottleneck of a detector, after its neck: the maps of three strides cross as one latent on the middle one's grid.

    fine, middle, coarse --pack--> (B, 768, 26, 26) -> encoder -> latent ~ bytes ~ decoder --unpack--> heads -> boxes

Everything after the neck sees these three maps only, and each is 128 channels wide: the narrowest place of the network.
They describe the same objects, and one linear map over all three removes what they share.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isthmus.models.recipes.vision.components import Components
from isthmus.models.recipes.vision.nanodet import WIDTH, Heads, NanoDet, candidates
from isthmus.models.vision.split import DenseDecoder

PACKED = 6 * WIDTH  # four fine positions, one middle one, a quarter of a coarse one
HIDDEN = 96  # of the encoder's nonlinear part


def pack(maps: Sequence[Tensor]) -> Tensor:
    """Maps (B, C, 2H, 2W), (B, C, H, W) and (B, C, H/2, W/2) -> (B, 6C, H, W)."""
    fine, middle, coarse = maps
    return torch.cat([F.pixel_unshuffle(fine, 2), middle, F.interpolate(coarse, scale_factor=2, mode="nearest")], 1)


def unpack(packed_BCHW: Tensor) -> list[Tensor]:
    """The inverse of `pack`; coarse positions are the mean of their four copies."""
    width = packed_BCHW.shape[1] // 6
    fine, middle, coarse = torch.split(packed_BCHW, [4 * width, width, width], 1)
    return [F.pixel_shuffle(fine, 2), middle, F.avg_pool2d(coarse, 2)]


class Trunk(nn.Module):
    """The device's part before the bottleneck: images -> packed maps."""

    def __init__(self, net: NanoDet) -> None:
        super().__init__()
        self.backbone, self.neck = net.backbone, net.neck

    def forward(self, images_B3HW: Tensor) -> Tensor:
        return pack(self.neck(self.backbone(images_B3HW)))


class MapEncoder(nn.Module):
    """Packed maps -> latent: a linear map, and two convolutions that are zero before training."""

    def __init__(self, latent: int) -> None:
        super().__init__()
        self.linear = nn.Conv2d(PACKED, latent, 1)
        self.reduce = nn.Conv2d(PACKED, HIDDEN, 1)
        self.correct = nn.Conv2d(HIDDEN, latent, 3, padding=1)
        nn.init.zeros_(self.correct.weight)
        nn.init.zeros_(self.correct.bias)  # type: ignore[arg-type]

    def forward(self, packed_BCHW: Tensor) -> Tensor:
        latent_BCHW: Tensor = self.linear(packed_BCHW) + self.correct(self.reduce(packed_BCHW).relu())
        return latent_BCHW

    @torch.no_grad()
    def start(self, components: Components) -> None:
        """Begin as the components of the maps."""
        self.linear.weight.copy_(components.analyse_LC[:, :, None, None])
        assert self.linear.bias is not None
        self.linear.bias.copy_(-components.analyse_LC @ components.mean_C)


class FromLatent(nn.Module):
    """The cloud's part: latent and rate -> boxes xyxy (B, N, 4) in pixels, scores (B, N, classes)."""

    def __init__(self, decoder: DenseDecoder, heads: Heads) -> None:
        super().__init__()
        self.decoder, self.heads = decoder, heads

    def forward(self, latent: Tensor, rate: Tensor) -> tuple[Tensor, Tensor]:
        return candidates(*self.heads(unpack(self.decoder(latent, rate))))
