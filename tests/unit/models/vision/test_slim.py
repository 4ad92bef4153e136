from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from isthmus.models.vision.efficientnet_lite import EfficientNetLite
from isthmus.models.vision.slim import (
    FrozenSlim,
    SlimConv,
    SlimEncoder,
    SlimFront,
    int8_scale,
    rounded,
    share,
)

WIDTHS = (0.5, 0.75, 1.0)
BLOCKS = 6  # before the one that becomes the bottleneck


@pytest.fixture(scope="module")
def backbone() -> nn.Sequential:
    torch.manual_seed(0)
    blocks = EfficientNetLite("efficientnet_lite0", 2).eval().blocks[: BLOCKS + 1]
    for norm in (module for module in blocks.modules() if isinstance(module, nn.BatchNorm2d)):
        nn.init.uniform_(norm.running_var, 0.5, 2.0)
        nn.init.normal_(norm.bias, std=0.3)
        nn.init.normal_(norm.running_mean, std=0.3)
    return blocks


@pytest.fixture(scope="module")
def encoder(backbone: nn.Sequential) -> SlimEncoder:
    torch.manual_seed(1)
    encoder = SlimEncoder(backbone, 5, WIDTHS)
    encoder.front.load(backbone[:-1])
    return encoder.eval()


@pytest.fixture(scope="module")
def images() -> Tensor:
    torch.manual_seed(2)
    return torch.rand(2, 3, 66, 60)


@pytest.mark.parametrize("width", range(3))
def test_every_width_gives_a_latent_of_one_shape(encoder: SlimEncoder, images: Tensor, width: int) -> None:
    with torch.no_grad():
        assert encoder(images, width).shape == (2, 5, 5, 4)  # a sixteenth of the image's sides, rounded up


def test_widths_give_different_latents(encoder: SlimEncoder, images: Tensor) -> None:
    with torch.no_grad():
        latents = [encoder(images, width) for width in range(3)]
    assert not torch.allclose(latents[0], latents[1])
    assert not torch.allclose(latents[1], latents[2])


def test_the_widest_front_is_the_backbone_up_to_8_bit_rounding(
    backbone: nn.Sequential, encoder: SlimEncoder, images: Tensor
) -> None:
    with torch.no_grad():
        wanted, found = backbone[:-1](images), encoder.front(images, -1)
    assert (found - wanted).std() < 0.1 * wanted.std()


def test_without_rounding_it_is_the_backbone(
    backbone: nn.Sequential, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("isthmus.models.vision.slim.rounded", lambda weight: weight)
    first = backbone[:-1]
    front = SlimFront(first, WIDTHS)
    front.load(first)
    with torch.no_grad():
        torch.testing.assert_close(front.eval()(images, 2), first(images), rtol=1e-3, atol=1e-3)


def test_a_narrow_width_uses_the_first_channels_alone(encoder: SlimEncoder, images: Tensor) -> None:
    """Later channels may hold anything."""
    conv = encoder.front.blocks[0].convs[0]  # type: ignore[index, union-attr]
    kept = conv.weight.detach().clone()
    with torch.no_grad():
        before = encoder(images, 0)
        conv.weight[conv.channels[0] :] *= -0.5
        after, widest = encoder(images, 0), encoder(images, 2)
        conv.weight.copy_(kept)
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert not torch.allclose(widest, encoder(images, 2))


def test_half_the_width_costs_less_than_two_fifths(encoder: SlimEncoder) -> None:
    from isthmus.models.recipes.vision.parts import macs

    image = torch.zeros(1, 3, 64, 64)
    assert 2.5 * macs(encoder, image, 0) < macs(encoder, image, 2)


def test_rounded_weights_are_255_levels_of_each_channel() -> None:
    torch.manual_seed(0)
    weight = torch.randn(4, 3, 3, 3)
    levels = rounded(weight) / int8_scale(weight)
    torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-4)
    assert levels.abs().amax((1, 2, 3)).tolist() == pytest.approx([127] * 4)


def test_gradients_pass_the_rounding() -> None:
    weight = torch.randn(2, 1, 1, 1, requires_grad=True)
    rounded(weight).sum().backward()  # type: ignore[no-untyped-call]
    assert weight.grad is not None
    assert weight.grad.flatten().tolist() == [1.0, 1.0]


def test_a_channel_of_zeros_rounds_to_zeros() -> None:
    assert not rounded(torch.zeros(2, 3, 1, 1)).any()


@pytest.mark.parametrize(("channels", "width", "kept"), [(32, 0.5, 16), (24, 0.75, 18), (1, 0.1, 1), (48, 1.0, 48)])
def test_share(channels: int, width: float, kept: int) -> None:
    assert share(channels, width) == kept


@pytest.mark.parametrize("width", range(3))
def test_what_is_shipped_computes_the_same(encoder: SlimEncoder, images: Tensor, width: int) -> None:
    with torch.no_grad():
        wanted, found = encoder(images, width), FrozenSlim(encoder)(images, width)
    torch.testing.assert_close(found, wanted, rtol=0.01, atol=0.01 * float(wanted.std()))


def test_what_is_shipped_holds_each_weight_once_in_a_byte(encoder: SlimEncoder) -> None:
    state = FrozenSlim(encoder).state_dict()
    weights = [tensor for name, tensor in state.items() if name.endswith("weight")]
    trained = [module.weight for module in encoder.modules() if isinstance(module, SlimConv)]
    assert {tensor.dtype for tensor in weights} == {torch.int8}
    assert sum(tensor.numel() for tensor in weights) == sum(tensor.numel() for tensor in trained)
    assert {tensor.dtype for name, tensor in state.items() if not name.endswith("weight")} == {torch.float16}


def test_every_width_of_the_bottleneck_gives_the_whole_latent(encoder: SlimEncoder) -> None:
    *inner, last = [conv for conv in encoder.bottleneck.convs if isinstance(conv, SlimConv)]
    assert [conv.channels for conv in inner] == [(120, 180, 240)] * 2
    assert last.channels == (5, 5, 5)
