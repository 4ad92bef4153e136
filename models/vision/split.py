"""A backbone cut in two with a bottleneck between, exits on the way: the PyTorch side, for training and the cloud.

Knows nothing about rates' integer tables or the wire.

    images_B3HW -> trunk[0] -> exit 0
                   trunk[1] -> exit 1
                   ...      -> encoder -> latent_BCHW ~~~ the bridge ~~~ decoder -> tail -> logits_BK

`tail(trunk(x))` is the unsplit backbone: a whole image sent to the cloud goes that way and meets no bottleneck.
Source: Matsubara et al., "Supervised Compression for Resource-Constrained Edge Computing Systems" (WACV 2022).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.manifest import Architecture
from models.vision.efficientnet_lite import EfficientNetLite, InvertedResidual, Stage, conv_bn

EXIT_CHANNELS = 256


class ExitHead(nn.Module):
    """Depthwise-separable stride-2 block, 1x1 convolution, mean and maximum over pixels, linear layer.

    The maximum matters: a crack covers few pixels.
    """

    def __init__(self, inputs: int, classes: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            InvertedResidual(inputs, inputs, Stage(inputs, 1, 2, 3, 2), stride=2),
            conv_bn(inputs, EXIT_CHANNELS, 1),
        )
        self.linear = nn.Linear(2 * EXIT_CHANNELS, classes)

    def forward(self, features_BCHW: Tensor) -> Tensor:
        hidden_BCHW = self.body(features_BCHW)
        pooled_BD = torch.cat([hidden_BCHW.mean((2, 3)), hidden_BCHW.amax((2, 3))], 1)
        logits_BK: Tensor = self.linear(pooled_BD)
        return logits_BK


class Encoder(nn.Module):
    """Trunk features -> latent of few channels at the same resolution."""

    def __init__(self, inputs: int, latent: int) -> None:
        super().__init__()
        self.body = InvertedResidual(inputs, inputs, Stage(inputs, 1, 1, 3, 2), stride=1)
        self.project = nn.Conv2d(inputs, latent, 1)

    def forward(self, features_BCHW: Tensor) -> Tensor:
        latent_BCHW: Tensor = self.project(self.body(features_BCHW))
        return latent_BCHW


class Decoder(nn.Module):
    """Latent -> trunk features, told the rate by one bias vector a rate."""

    def __init__(self, latent: int, outputs: int, hidden: int, rates: int) -> None:
        super().__init__()
        self.expand = nn.Conv2d(latent, hidden, 3, padding=1)
        self.rate_bias = nn.Embedding(rates, hidden)
        self.body = nn.Sequential(
            *(InvertedResidual(hidden, hidden, Stage(hidden, 1, 1, 5, 3), stride=1) for _ in range(3))
        )
        self.project = nn.Conv2d(hidden, outputs, 1)
        nn.init.zeros_(self.rate_bias.weight)

    def forward(self, latent_BCHW: Tensor, rate_B: Tensor) -> Tensor:
        hidden_BCHW = self.expand(latent_BCHW) + self.rate_bias(rate_B)[:, :, None, None]
        features_BCHW: Tensor = self.project(self.body(hidden_BCHW))
        return features_BCHW


class SplitClassifier(nn.Module):
    """Backbone, cuts, exits and bottleneck as one module, so that one state dict holds all weights."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.cuts = architecture.cuts
        self.backbone = EfficientNetLite(architecture.backbone, architecture.classes)
        widths = [self.backbone.channels[cut - 1] for cut in self.cuts]
        self.exits = nn.ModuleList(ExitHead(width, architecture.classes) for width in widths)
        self.encoder = Encoder(widths[-1], architecture.latent_channels)
        self.decoder = Decoder(
            architecture.latent_channels, widths[-1], architecture.decoder_channels, architecture.rates
        )

    def segment(self, index: int, x_BCHW: Tensor) -> Tensor:
        """Features after cut `index`, from those after the cut before it (or from the image)."""
        start = self.cuts[index - 1] if index else 0
        features_BCHW: Tensor = self.backbone.blocks[start : self.cuts[index]](x_BCHW)
        return features_BCHW

    def trunk(self, images_B3HW: Tensor) -> Tensor:
        """Features after the last cut."""
        features_BCHW: Tensor = self.backbone.blocks[: self.cuts[-1]](images_B3HW)
        return features_BCHW

    def tail(self, features_BCHW: Tensor) -> Tensor:
        """Logits from features after the last cut."""
        logits_BK: Tensor = self.backbone.blocks[self.cuts[-1] :](features_BCHW)
        return logits_BK

    def forward(self, images_B3HW: Tensor) -> Tensor:
        """The unsplit backbone."""
        logits_BK: Tensor = self.backbone(images_B3HW)
        return logits_BK
