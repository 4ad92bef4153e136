"""Architectures of a well-known library, without trained weights, cut where tokens or maps of several scales cross."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    DeiTConfig,
    DeiTForImageClassification,
    Dinov2Config,
    Dinov2Model,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    SwinConfig,
    SwinForImageClassification,
)

from isthmus.models.messages import TaskKind
from isthmus.models.recipes.vision.cutting import blocks, capture

SIDE = 64
SMALL = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": SIDE, "patch_size": 8}


class Plain(nn.Module):
    """A network of the library's, from pixels to one tensor of its answer."""

    def __init__(self, net: nn.Module, output: str = "logits") -> None:
        super().__init__()
        self.net, self.output = net, output

    def forward(self, images_B3HW: Tensor) -> Tensor:
        found: Tensor = getattr(self.net(pixel_values=images_B3HW), self.output)
        return found


def deit() -> nn.Module:
    return Plain(DeiTForImageClassification(DeiTConfig(**SMALL, intermediate_size=48)))


def swin() -> nn.Module:
    config = SwinConfig(image_size=SIDE, embed_dim=12, depths=[1, 1], num_heads=[1, 2], window_size=4)
    return Plain(SwinForImageClassification(config))


def segformer() -> nn.Module:
    config = SegformerConfig(depths=[1, 1, 1, 1], hidden_sizes=[8, 16, 24, 32], decoder_hidden_size=16)
    return Plain(SegformerForSemanticSegmentation(config))


def dinov2() -> nn.Module:
    return Plain(Dinov2Model(Dinov2Config(**SMALL)), "pooler_output")


@torch.inference_mode()
@pytest.mark.parametrize(
    ("factory", "kind", "cut", "shape"),
    [
        (deit, "classify", "net.deit.layers.0", (24, 9, 8)),  # class and distillation token above the grid
        (swin, "classify", "net.swin.encoder.layers.0.downsample", (24, 8, 8)),
        (segformer, "segment", "net.segformer.stages.3.patch_embeddings.proj", None),  # maps of four scales
        (dinov2, "embed", "net.encoder.layer.0", (24, 9, 8)),
    ],
    ids=["tokens", "windows", "scales", "embedding"],
)
def test_a_transformer_of_a_library_is_the_same_in_blocks(
    factory: Callable[[], nn.Module], kind: TaskKind, cut: str, shape: tuple[int, int, int] | None
) -> None:
    with torch.inference_mode(False):
        torch.manual_seed(0)
        net = factory().eval()
        captured = capture(net, (3, SIDE, SIDE), kind)
    (found,) = (each.shape for each in captured.cuts if each.name == cut)
    assert shape in (found, None)
    trunk, rest = blocks(captured, (cut,))
    images_B3HW = torch.randn(3, 3, SIDE, SIDE)
    torch.testing.assert_close(rest(trunk(images_B3HW)), net(images_B3HW), rtol=1e-5, atol=1e-5)
