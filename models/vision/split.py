"""A backbone split in two, with exits and bottlenecks: the PyTorch side, for training and the cloud.

Knows nothing about rates' integer tables or the wire.

    images_B3HW -> taps[0].encoder -----------------> latent ~ bytes ~ taps[0].decoder -> [blocks] ------+
                -> segment 0 -> exit 0                                                                   |
                   segment 1 -> exit 1                                                                   |
                   ...       -> taps[1].encoder ----> latent ~ bytes ~ taps[1].decoder ------------------+-> tail
                                                                                                         +-> heads

A decoder reconstructs the features before some block of the backbone; the following blocks are the backbone's, or the
tap's own. `tail(trunk(x))` is the unsplit backbone, for whole images sent to the cloud. The tail computes the
first task; every other task has a small head on the same features.
Source: Matsubara et al., "Supervised Compression for Resource-Constrained Edge Computing Systems" (WACV 2022); several
tasks from one payload: Matsubara et al., "Ladon" (WACV 2025).
"""

from __future__ import annotations

from copy import deepcopy

import torch
from torch import Tensor, nn

from isthmus.models.vision.architecture import Architecture, TapArchitecture
from isthmus.models.vision.blocks import Blocks
from isthmus.models.vision.efficientnet_lite import EfficientNetLite, InvertedResidual, Stage, conv_bn, fuse_batch_norms
from isthmus.models.vision.slim import SlimEncoder

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

    def forward(self, features_BCHW: Tensor, width: int = 0) -> Tensor:
        """`width`: ignored, there is only one."""
        latent_BCHW: Tensor = self.project(self.body(features_BCHW))
        return latent_BCHW


class Decoder(nn.Module):
    """Latent -> trunk features, conditioned on the rate by one bias vector a rate."""

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


class DenseDecoder(nn.Module):
    """Latent -> trunk features: a linear map plus residual blocks of 3x3 convolutions conditioned on the rate.

    Its many weights stay in the cloud; matrix units run dense convolutions faster than `Decoder`'s depthwise ones.
    Before training it is the linear map only.
    """

    BLOCKS = 3

    def __init__(self, latent: int, outputs: int, hidden: int, rates: int) -> None:
        super().__init__()
        self.linear = nn.Conv2d(latent, outputs, 1)
        self.expand = nn.Conv2d(latent, hidden, 3, padding=1)
        self.rate_bias = nn.Embedding(rates, hidden * self.BLOCKS)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(hidden, hidden, 3, padding=1), nn.ReLU(), nn.Conv2d(hidden, hidden, 3, padding=1))
            for _ in range(self.BLOCKS)
        )
        self.project = nn.Conv2d(hidden, outputs, 1)
        nn.init.zeros_(self.rate_bias.weight)
        nn.init.zeros_(self.project.weight)
        nn.init.zeros_(self.project.bias)  # type: ignore[arg-type]

    def forward(self, latent_BCHW: Tensor, rate_B: Tensor) -> Tensor:
        hidden_BCHW = self.expand(latent_BCHW)
        biases = self.rate_bias(rate_B)[:, :, None, None].chunk(self.BLOCKS, 1)
        for block, bias_BC11 in zip(self.blocks, biases, strict=True):
            hidden_BCHW = hidden_BCHW + block((hidden_BCHW + bias_BC11).relu())
        features_BCHW: Tensor = self.linear(latent_BCHW) + self.project(hidden_BCHW.relu())
        return features_BCHW


def repeated(backbone: Blocks, tap: TapArchitecture) -> nn.Sequential:
    """The blocks that the encoder of a tap on the image repeats: the first ones, and the one before `rejoin`."""
    return nn.Sequential(*backbone.section(0, tap.blocks), backbone.blocks[tap.rejoin - 1])


class Tap(nn.Module):
    """One bottleneck: encoder for the device, decoder for the cloud.

    `between` and `tail`, where it has its own: the backbone's blocks from `rejoin` to the last cut, and from there on,
    batch norms fused.
    """

    def __init__(self, architecture: TapArchitecture, backbone: Blocks, cuts: tuple[int, ...]) -> None:
        super().__init__()
        self.latent_channels = latent = architecture.latent_channels
        self.rejoin = architecture.rejoin or cuts[-1]
        outputs = backbone.channels[self.rejoin - 1]
        if architecture.after:
            inputs = backbone.channels[cuts[architecture.after - 1] - 1]
            self.encoder: nn.Module = Encoder(inputs, latent)
        else:
            self.encoder = SlimEncoder(repeated(backbone, architecture), latent, architecture.widths)
        kind: type[Decoder | DenseDecoder] = DenseDecoder if architecture.rejoin else Decoder
        self.decoder = kind(latent, outputs, architecture.decoder_channels, architecture.rates)
        self.between: nn.Module | None = None
        self.tail: nn.Module | None = None
        if architecture.own_tail:
            blocks = fuse_batch_norms(deepcopy(backbone.section(self.rejoin)).eval())
            entry = cuts[-1] - self.rejoin
            self.between, self.tail = blocks[:entry], nn.Sequential(*blocks[entry:].children())

    @property
    def slim(self) -> SlimEncoder:
        """The encoder of a tap on the image."""
        assert isinstance(self.encoder, SlimEncoder)
        return self.encoder


class SplitClassifier(nn.Module):
    """Backbone, cuts, exits, taps and heads as one module, so that one state dict holds all weights."""

    def __init__(self, architecture: Architecture, backbone: Blocks | None = None) -> None:
        """`backbone`: the network itself, where `architecture.backbone` is not a name that we can build."""
        super().__init__()
        self.cuts = architecture.cuts
        first, *others = architecture.classes
        self.backbone = backbone or EfficientNetLite(architecture.backbone, first)
        widths = [self.backbone.channels[cut - 1] for cut in self.cuts]
        self.exit_blocks = architecture.exit_blocks
        self.exits = nn.ModuleList(ExitHead(width, first) for width in (() if self.exit_blocks else widths))
        self.taps = nn.ModuleList(Tap(tap, self.backbone, self.cuts) for tap in architecture.taps)
        self.heads = nn.ModuleList(ExitHead(widths[-1], classes) for classes in others)

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

    def exit(self, index: int) -> nn.Module:
        """Features after cut `index` -> logits: an exit head, or some of the backbone's later blocks."""
        if self.exit_blocks:
            return nn.Sequential(*(self.backbone.blocks[block] for block in self.exit_blocks[index]))
        return self.exits[index]

    def tap(self, index: int) -> Tap:
        """One bottleneck."""
        tap = self.taps[index]
        assert isinstance(tap, Tap)
        return tap

    def decode(self, tap: int, latent_BCHW: Tensor, rate_B: Tensor) -> Tensor:
        """Features after the last cut, from a dequantised latent."""
        bottleneck = self.tap(tap)
        between = bottleneck.between or self.backbone.blocks[bottleneck.rejoin : self.cuts[-1]]
        decoded_BCHW: Tensor = between(bottleneck.decoder(latent_BCHW, rate_B))
        return decoded_BCHW

    def answer(self, features_BCHW: Tensor, task: int, tap: int | None = None) -> Tensor:
        """Logits of one task from features after the last cut: the trunk's, or those that `decode` gives for a tap."""
        if task:
            logits_BK: Tensor = self.heads[task - 1](features_BCHW)
            return logits_BK
        own = None if tap is None else self.tap(tap).tail
        logits_BK = self.tail(features_BCHW) if own is None else own(features_BCHW)
        return logits_BK

    def forward(self, images_B3HW: Tensor) -> Tensor:
        """The unsplit backbone."""
        logits_BK: Tensor = self.backbone(images_B3HW)
        return logits_BK
