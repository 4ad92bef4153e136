"""The encoders, decoders and quantisers of the bottlenecks that ours is compared with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isthmus.models.recipes.vision.compressai_entropy import GDN1
from isthmus.models.recipes.vision.rates import Rates
from isthmus.models.vision.split import DenseDecoder


class ResidualBlock(nn.Module):
    """3x3, GELU, 3x3, added to the input."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, hidden, 3, padding=1), nn.GELU(), nn.Conv2d(hidden, channels, 3, padding=1)
        )

    def forward(self, x_BCHW: Tensor) -> Tensor:
        y_BCHW: Tensor = self.body(x_BCHW)
        return x_BCHW + y_BCHW


class Plain(nn.Module):
    """An encoder of one width."""

    def __init__(self, *layers: nn.Module, multiple: int = 1) -> None:
        """`multiple`: images are padded by reflection to a multiple of this many pixels."""
        super().__init__()
        self.layers = nn.Sequential(*layers)
        self.multiple = multiple

    def forward(self, images_B3HW: Tensor, width: int = 0) -> Tensor:
        bottom, right = (-side % self.multiple for side in images_B3HW.shape[2:])
        latent_BCHW: Tensor = self.layers(F.pad(images_B3HW, (0, right, 0, bottom), mode="reflect"))
        return latent_BCHW


class Strided(nn.Module):
    """Convolutions that reduce a latent to the resolution of the features, then our decoder."""

    def __init__(self, downsample: nn.Sequential, decoder: DenseDecoder) -> None:
        super().__init__()
        self.downsample, self.decoder = downsample, decoder

    def forward(self, latent_BCHW: Tensor, rate_B: Tensor) -> Tensor:
        features_BCHW: Tensor = self.decoder(self.downsample(latent_BCHW), rate_B)
        return features_BCHW


class EightBits(Rates):
    """In place of learned rates: 8-bit affine quantisation between the latent's extremes (Jacob et al., 2018)."""

    def __init__(self) -> None:
        super().__init__(0, (0.0,))

    def forward(self, latent_BCHW: Tensor, rate_B: Tensor) -> tuple[Tensor, Tensor]:
        low_B111, step_B111 = affine(latent_BCHW.float())
        levels_BCHW = (latent_BCHW - low_B111) / step_B111
        rounded_BCHW = levels_BCHW + (levels_BCHW.round() - levels_BCHW).detach()
        bits_B = torch.full((len(rate_B),), 8.0 * latent_BCHW[0].numel() + 64)
        return bits_B, rounded_BCHW * step_B111 + low_B111

    def price(self, bits_B: Tensor, rate_B: Tensor) -> tuple[Tensor, dict[str, float]]:
        return bits_B.new_zeros(()), {"bytes0": bits_B.mean().item() / 8}


def affine(latent_BCHW: Tensor) -> tuple[Tensor, Tensor]:
    """Zero point and step of 8-bit quantisation, of each image."""
    low_B111, high_B111 = latent_BCHW.amin((1, 2, 3), keepdim=True), latent_BCHW.amax((1, 2, 3), keepdim=True)
    return low_B111.detach(), ((high_B111 - low_B111) / 255).clamp_min(1e-6).detach()


def entropic_student_encoder() -> Plain:
    """Matsubara et al.: 24 channels at a quarter of the image's side; 138,672 weights."""
    return Plain(
        nn.Conv2d(3, 96, 5, 2, 2, bias=False),
        GDN1(96),
        nn.Conv2d(96, 48, 5, 2, 2, bias=False),
        GDN1(48),
        nn.Conv2d(48, 24, 2, 1, 0, bias=False),
    )


def patch_encoder(blocks: int) -> Plain:
    """Duan & Zhu: 8x8 patches, residual blocks, 64 channels at an eighth of the image's side."""
    return Plain(
        nn.Conv2d(3, 128, 8, 8), *(ResidualBlock(128, 64) for _ in range(blocks)), nn.Conv2d(128, 64, 1), multiple=8
    )


def few_channels_encoder(channels: int) -> Plain:
    """BottleFit: a ResNet's stem, then 2x2 convolutions down to a few channels at a quarter of the image's side."""
    return Plain(
        nn.Conv2d(3, 64, 7, 2, 3, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, 1),
        nn.Conv2d(64, 64, 2, padding=1, bias=False),
        nn.BatchNorm2d(64),
        nn.Conv2d(64, 256, 2, padding=1, bias=False),
        nn.BatchNorm2d(256),
        nn.ReLU(),
        nn.Conv2d(256, 64, 2, bias=False),
        nn.BatchNorm2d(64),
        nn.Conv2d(64, channels, 2, bias=False),
    )


def by_four(inputs: int, hidden: int) -> nn.Sequential:
    """From a quarter of the image's side to a sixteenth."""
    return nn.Sequential(
        nn.Conv2d(inputs, 96, 5, 2, 2), GDN1(96, inverse=True), nn.Conv2d(96, hidden, 5, 2, 2), nn.GELU()
    )
