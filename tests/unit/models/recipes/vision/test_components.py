from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from isthmus.models.recipes.vision.components import (
    Components,
    find_components,
    information,
    start,
    start_decoder,
    start_projection,
)
from isthmus.models.vision.efficientnet_lite import EfficientNetLite
from isthmus.models.vision.slim import SlimEncoder
from isthmus.models.vision.split import DenseDecoder, Encoder

CHANNELS = 6


class Reads(nn.Module):
    """Logits that look at some channels alone."""

    def __init__(self, *channels: int) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, features_BCHW: Tensor) -> Tensor:
        seen_BC = features_BCHW[:, list(self.channels)].mean((2, 3))
        return torch.cat([seen_BC, -seen_BC], 1)


@pytest.fixture(scope="module")
def features() -> Tensor:
    """Channel c varies c + 1 times as much as channel 0."""
    torch.manual_seed(0)
    return torch.randn(64, CHANNELS, 5, 4) * torch.arange(1.0, CHANNELS + 1)[:, None, None] + 2


@pytest.fixture(scope="module")
def components(features: Tensor) -> Components:
    return find_components(features, Reads(0, 1), 3)


def test_information_is_in_what_the_answer_reads(features: Tensor) -> None:
    diagonal_C = information(features, Reads(2)).diagonal()
    assert diagonal_C.argmax() == 2
    assert diagonal_C[[0, 1, 3, 4, 5]].max() < 0.02 * diagonal_C[2]


def test_what_the_answer_reads_comes_before_what_varies_most(components: Components) -> None:
    first_C = components.analyse_LC[0].abs()
    assert set(first_C.argsort(descending=True)[:2].tolist()) == {0, 1}


def test_synthesis_undoes_analysis_when_every_component_is_kept(features: Tensor) -> None:
    found = find_components(features, Reads(0, 1), CHANNELS)
    back = torch.einsum("cl,blhw->bchw", found.synthesise_CL, found.latent(features)) + found.mean_C[:, None, None]
    torch.testing.assert_close(back, features, rtol=1e-3, atol=1e-3)


def test_the_latents_deviations_are_what_is_said(components: Components, features: Tensor) -> None:
    latent = components.latent(features)
    torch.testing.assert_close(latent.std((0, 2, 3)), components.deviation_L, rtol=0.02, atol=1e-3)
    assert components.deviation_L.square().mean() == pytest.approx(1)
    torch.testing.assert_close(latent.mean((0, 2, 3)), torch.zeros(3), rtol=0, atol=1e-3)


def test_components_are_the_same_every_time(components: Components, features: Tensor) -> None:
    again = find_components(features, Reads(0, 1), 3)
    assert torch.equal(components.analyse_LC, again.analyse_LC)


def test_an_encoder_starts_with_the_components_of_its_backbone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("isthmus.models.vision.slim.rounded", lambda weight: weight)
    torch.manual_seed(0)
    blocks = EfficientNetLite("efficientnet_lite0", 2).eval().blocks[:7]
    for norm in (module for module in blocks.modules() if isinstance(module, nn.BatchNorm2d)):
        nn.init.uniform_(norm.running_var, 0.5, 2.0)
        nn.init.normal_(norm.bias, std=0.3)
        nn.init.normal_(norm.running_mean, std=0.3)
    images = torch.rand(4, 3, 64, 64)
    with torch.no_grad():
        features = blocks(images)
        wanted = find_components(features, Reads(0, 3), 5)
        encoder = SlimEncoder(blocks, 5, (0.5, 1.0)).eval()
        start(encoder, blocks, wanted)
        found, narrow = encoder(images, 1), encoder(images, 0)
    torch.testing.assert_close(found, wanted.latent(features), rtol=1e-2, atol=1e-2)
    assert narrow.shape == found.shape
    assert not torch.allclose(narrow, found)


@torch.no_grad()
def test_an_encoder_of_features_starts_as_their_components_and_a_decoder_as_the_way_back(features: Tensor) -> None:
    found = find_components(features, Reads(0, 1), CHANNELS)
    encoder, decoder = Encoder(CHANNELS, CHANNELS).eval(), DenseDecoder(CHANNELS, CHANNELS, 8, 2).eval()
    start_projection(encoder, found)
    start_decoder(decoder, found)
    torch.testing.assert_close(encoder(features), found.latent(features), rtol=1e-3, atol=1e-3)
    rate_B = torch.zeros(len(features), dtype=torch.long)
    torch.testing.assert_close(decoder(encoder(features), rate_B), features, rtol=1e-3, atol=1e-3)
