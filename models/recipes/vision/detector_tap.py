"""Where NanoDet is cut: after its neck, whose maps of three strides cross as one map on the middle one's grid.

    fine, middle, coarse --Pack--> (B, 768, 26, 26) -> encoder -> latent ~ bytes ~ decoder --Unpack--> heads -> boxes

Everything after the neck sees these three maps only, and each is 128 channels wide: the narrowest place of the network.
They describe the same objects, and one linear map over all three removes what they share.
"""

from __future__ import annotations

from torch import Tensor, nn

from isthmus.models.recipes.vision.answer_training import Halves
from isthmus.models.recipes.vision.crossing import Layout, Pack, Unpack
from isthmus.models.recipes.vision.nanodet import SIDE, STRIDES, WIDTH, Heads, NanoDet, candidates

LAYOUTS = tuple(Layout("map", (WIDTH, SIDE // stride, SIDE // stride)) for stride in STRIDES)


class Trunk(nn.Module):
    """The device's part before the bottleneck: images -> packed maps."""

    def __init__(self, net: NanoDet) -> None:
        super().__init__()
        self.backbone, self.neck, self.pack = net.backbone, net.neck, Pack(LAYOUTS)

    def forward(self, images_B3HW: Tensor) -> Tensor:
        packed_BCHW: Tensor = self.pack(*self.neck(self.backbone(images_B3HW)))
        return packed_BCHW


class PackedHeads(Heads):
    """The network after its neck: packed maps -> boxes and scores, with the weights of some heads."""

    def __init__(self, heads: Heads) -> None:
        super().__init__()
        self.convs, self.outputs, self.unpack = heads.convs, heads.outputs, Unpack(LAYOUTS)

    def forward(self, packed_BCHW: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return candidates(*super().forward(self.unpack(packed_BCHW)))


def halves(net: NanoDet) -> Halves:
    """A network cut after its neck."""
    return Halves("detect", Trunk(net), PackedHeads(net.heads), Pack(LAYOUTS).shape[0])
