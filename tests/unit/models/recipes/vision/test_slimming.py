from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from isthmus.models.recipes.vision.components import find_components, start
from isthmus.models.recipes.vision.slimming import CROP, Slimming, random_crops, sorted_channels
from isthmus.models.vision.efficientnet_lite import EfficientNetLite
from isthmus.models.vision.slim import SlimConv, SlimEncoder, conv_norms

WIDTHS = (0.5, 1.0)


@pytest.fixture(scope="module")
def images() -> Tensor:
    torch.manual_seed(1)
    return torch.rand(4, 3, 64, 64) * 2 - 1


@pytest.fixture
def more(images: Tensor) -> nn.Sequential:
    """A stem, a block without expansion, one with, two residual ones, one of stride 2; statistics of the images."""
    torch.manual_seed(0)
    blocks = EfficientNetLite("efficientnet_lite2", 2).blocks[:6]
    for norm in (module for module in blocks.modules() if isinstance(module, nn.BatchNorm2d)):
        norm.momentum = 1.0
        nn.init.uniform_(norm.weight, 0.2, 2.0)
    blocks.train()(images)
    return blocks.eval()


@pytest.fixture
def blocks(more: nn.Sequential) -> nn.Sequential:
    """All but the last, so that they end with a residual one."""
    return more[:-1]


def test_sorting_changes_the_order_of_the_output_channels_alone(blocks: nn.Sequential, images: Tensor) -> None:
    with torch.no_grad():
        wanted, found = blocks(images), sorted_channels(blocks, images)(images)
    assert not torch.allclose(found, wanted, atol=1e-3)
    match = torch.cdist(found.transpose(0, 1).flatten(1), wanted.transpose(0, 1).flatten(1)).min(1)
    assert match.values.max() < 1e-2
    assert sorted(match.indices.tolist()) == list(range(wanted.shape[1]))


def test_sorting_leaves_the_original_as_it_is(blocks: nn.Sequential, images: Tensor) -> None:
    before = {name: tensor.clone() for name, tensor in blocks.state_dict().items()}
    sorted_channels(blocks, images)
    assert all(torch.equal(tensor, before[name]) for name, tensor in blocks.state_dict().items())


def test_a_dead_channel_goes_last(blocks: nn.Sequential, images: Tensor) -> None:
    """Hidden channel 0 of the third block says nothing: no weight that reads the stream may reach the first places."""
    expand, _ = conv_norms(blocks[2])[0]
    nn.init.zeros_(expand.weight[:1])
    first, _ = conv_norms(sorted_channels(blocks, images)[2])[0]
    assert first.weight[-1].abs().max() == 0
    assert first.weight[0].abs().max() > 0


@pytest.fixture
def module(more: nn.Sequential, images: Tensor) -> Slimming:
    """An encoder of all the blocks, started from the first components of what they give."""
    ordered = sorted_channels(more, images)
    with torch.no_grad():
        wanted = find_components(more(images), mean_of_pixels, 8)
    encoder = SlimEncoder(ordered, 8, WIDTHS)
    start(encoder, ordered, wanted)
    return Slimming(encoder, more, wanted)


def mean_of_pixels(features_BCHW: Tensor) -> Tensor:
    """Logits of as many classes as channels."""
    return features_BCHW.mean((2, 3))


def test_the_widest_width_starts_as_the_teacher(module: Slimming, images: Tensor) -> None:
    distances: dict[str, float] = {}
    for _ in range(8):
        distances |= module.eval().loss(images)[1]
    assert distances["width 1.0"] < 0.1 < distances["width 0.5"]


def test_narrow_widths_learn(module: Slimming, images: Tensor) -> None:
    teacher = {name: tensor.clone() for name, tensor in module.teacher.state_dict().items()}
    optimizer = torch.optim.Adam([p for p in module.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(8):
        loss, figures = module.train().loss(images)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(figures["width 0.5"])
    assert losses[-1] < 0.8 * losses[0]
    assert all(torch.equal(tensor, teacher[name]) for name, tensor in module.teacher.state_dict().items())


def test_the_widest_width_keeps_its_statistics(module: Slimming, images: Tensor) -> None:
    convs = [conv for conv in module.encoder.modules() if isinstance(conv, SlimConv)]
    before = [conv.norms[-1].running_mean.clone() for conv in convs]  # type: ignore[union-attr, operator]
    for _ in range(4):
        module.train().loss(images)
    assert all(torch.equal(conv.norms[-1].running_mean, mean) for conv, mean in zip(convs, before, strict=True))  # type: ignore[arg-type]


def test_crops_are_squares_of_the_images() -> None:
    columns = torch.arange(300).float().expand(2, 1, 300, 300)
    crops = random_crops(columns, torch.Generator().manual_seed(0))
    assert crops.shape == (2, 1, CROP, CROP)
    assert (crops[0, 0, 0].diff() == 1).all()


def test_small_images_are_left_whole() -> None:
    assert random_crops(torch.zeros(1, 3, 40, 50), torch.Generator()).shape == (1, 3, 40, 50)
