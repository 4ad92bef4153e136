from __future__ import annotations

import pytest
import torch
from torch import Tensor

from isthmus.models.vision.efficientnet_lite import EfficientNetLite
from isthmus.models.vision.split import SplitClassifier
from tests.tiny_bundle import TAPS, TINY


@pytest.fixture(scope="module")
def images_B3HW() -> Tensor:
    torch.manual_seed(1)
    return torch.rand(3, 3, 64, 64) * 2 - 1


@torch.inference_mode()
def test_the_segments_in_a_row_are_the_trunk(tiny_split: SplitClassifier, images_B3HW: Tensor) -> None:
    chained_BCHW = tiny_split.segment(1, tiny_split.segment(0, images_B3HW))
    torch.testing.assert_close(chained_BCHW, tiny_split.trunk(images_B3HW), rtol=0, atol=0)


@torch.inference_mode()
def test_tail_of_trunk_is_the_backbone(tiny_split: SplitClassifier, images_B3HW: Tensor) -> None:
    joined_BK = tiny_split.tail(tiny_split.trunk(images_B3HW))
    torch.testing.assert_close(joined_BK, tiny_split.backbone(images_B3HW), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(joined_BK, tiny_split(images_B3HW), rtol=1e-4, atol=1e-4)


@torch.inference_mode()
@pytest.mark.parametrize("width", [0, 1])
def test_every_bottleneck_gives_back_the_trunks_shape(
    tiny_split: SplitClassifier, images_B3HW: Tensor, width: int
) -> None:
    features_BCHW = tiny_split.trunk(images_B3HW)
    light, deep = tiny_split.taps
    latents = light.encoder(images_B3HW, width), deep.encoder(features_BCHW)
    for name, tap, latent_BCHW, channels in zip(TAPS, (light, deep), latents, (3, 4), strict=True):
        assert latent_BCHW.shape == (3, channels, *features_BCHW.shape[2:])
        assert tap.decoder(latent_BCHW, torch.tensor([0, 1, 0])).shape == features_BCHW.shape
        decoded_BCHW = tiny_split.decode(TAPS.index(name), latent_BCHW, torch.tensor([0, 1, 0]))
        assert decoded_BCHW.shape == features_BCHW.shape


@torch.inference_mode()
def test_decoded_features_go_on_from_the_block_that_takes_them(tiny_split: SplitClassifier) -> None:
    latent_BCHW, rate_B = torch.ones(1, 3, 8, 8), torch.tensor([1])
    tap = tiny_split.tap(0)
    assert tap.between is not None
    rest_BCHW = tap.between(tap.decoder(latent_BCHW, rate_B))
    torch.testing.assert_close(tiny_split.decode(0, latent_BCHW, rate_B), rest_BCHW, rtol=0, atol=0)


@torch.inference_mode()
def test_blocks_of_its_own_start_as_the_backbones(images_B3HW: Tensor) -> None:
    split = SplitClassifier(TINY).eval()
    tap = split.tap(0)
    assert tap.between is not None
    assert tap.tail is not None
    trunk_BCHW = split.backbone.blocks[: tap.rejoin](images_B3HW)
    features_BCHW = tap.between(trunk_BCHW)
    torch.testing.assert_close(features_BCHW, split.trunk(images_B3HW), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(tap.tail(features_BCHW), split(images_B3HW), rtol=1e-4, atol=1e-4)


def test_without_blocks_of_its_own_a_tap_uses_the_backbones() -> None:
    plain = TINY.taps[0].model_copy(update={"own_tail": False})
    split = SplitClassifier(TINY.model_copy(update={"taps": (plain, TINY.taps[1])})).eval()
    latent_BCHW, rate_B = torch.ones(1, 3, 8, 8), torch.tensor([1])
    with torch.inference_mode():
        rest_BCHW = split.backbone.blocks[5](split.taps[0].decoder(latent_BCHW, rate_B))
        torch.testing.assert_close(split.decode(0, latent_BCHW, rate_B), rest_BCHW, rtol=0, atol=0)
        torch.testing.assert_close(split.answer(rest_BCHW, 0, 0), split.tail(rest_BCHW), rtol=0, atol=0)


@torch.inference_mode()
@pytest.mark.parametrize("tap", [0, 1])
def test_each_input_is_decoded_at_its_own_rate(tiny_split: SplitClassifier, tap: int) -> None:
    decoder = tiny_split.taps[tap].decoder
    latent_BCHW = torch.ones(1, (3, 4)[tap], 8, 8).expand(2, -1, -1, -1)
    mixed_BCHW = decoder(latent_BCHW, torch.tensor([0, 1]))
    assert not torch.allclose(mixed_BCHW[0], mixed_BCHW[1])
    for rate in (0, 1):
        alone_BCHW = decoder(latent_BCHW[:1], torch.tensor([rate]))
        torch.testing.assert_close(alone_BCHW[0], mixed_BCHW[rate], rtol=1e-4, atol=1e-5)


@torch.inference_mode()
def test_the_first_task_is_the_tails_and_every_other_has_a_head(
    tiny_split: SplitClassifier, images_B3HW: Tensor
) -> None:
    features_BCHW = tiny_split.trunk(images_B3HW)
    own = tiny_split.tap(0).tail
    assert own is not None
    for tap, tail in ((None, tiny_split.tail), (0, own), (1, tiny_split.tail)):
        answer_BK = tiny_split.answer(features_BCHW, 0, tap)
        torch.testing.assert_close(answer_BK, tail(features_BCHW), rtol=0, atol=0)
        answer_BK = tiny_split.answer(features_BCHW, 1, tap)
        torch.testing.assert_close(answer_BK, tiny_split.heads[0](features_BCHW), rtol=0, atol=0)


@torch.inference_mode()
def test_an_exit_sees_the_brightest_pixel_beside_the_mean(tiny_split: SplitClassifier, images_B3HW: Tensor) -> None:
    features_BCHW = tiny_split.segment(0, images_B3HW)
    exit_head = tiny_split.exits[0]
    seen: list[Tensor] = []
    hook = exit_head.linear.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    exit_head(features_BCHW)
    hook.remove()
    pixels_BCN = exit_head.body(features_BCHW).flatten(2)
    torch.testing.assert_close(seen[0], torch.cat([pixels_BCN.mean(2), pixels_BCN.max(2).values], 1))


@torch.inference_mode()
def test_an_exit_of_the_backbone_s_blocks_has_no_weights_of_its_own(images_B3HW: Tensor) -> None:
    rest = len(EfficientNetLite(TINY.backbone, 2).blocks)
    blocks = tuple(tuple(range(cut, rest)) for cut in TINY.cuts)
    split = SplitClassifier(TINY.model_copy(update={"exit_blocks": blocks})).eval()
    assert not [name for name in split.state_dict() if name.startswith("exits")]
    features_BCHW = split.segment(0, images_B3HW)
    torch.testing.assert_close(split.exit(0)(features_BCHW), split(images_B3HW), rtol=0, atol=0)


def test_one_state_dict_holds_every_part(tiny_split: SplitClassifier) -> None:
    assert {name.split(".")[0] for name in tiny_split.state_dict()} == {"backbone", "exits", "taps", "heads"}
