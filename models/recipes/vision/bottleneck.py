"""One bottleneck distilled from a frozen teacher, on fixed views of the photographs: encoder, rates, decoder, tail.

    view -> encoder (at a width) -> rounded latent -> decoder -> tail   <- teacher's inner features, answer, label
                                       | bits

The joint loss of Duan & Zhu ("Efficient Feature Compression for Edge-Cloud Systems", PCS 2022): task, distillation,
features after the decoder and in the tail, rate. The tail's depthwise convolutions and batch norms stay frozen: their
gradients are two thirds of its cost, and training them on 1,500 photographs brings nothing.
"""

from __future__ import annotations

import math
from copy import deepcopy
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from isthmus.models.recipes.vision.distil import LossWeights, answer_loss, relative_distance
from isthmus.models.recipes.vision.rates import Rates
from isthmus.models.vision.architecture import TapArchitecture
from isthmus.models.vision.efficientnet_lite import fuse_batch_norms
from isthmus.models.vision.split import DenseDecoder, SplitClassifier

BETWEEN_LR, TAIL_LR = 0.3, 0.1  # relative to new parts: a trained tail forgets at higher rates
STEP_AT_ONE, PRICE_POWER = 1.45, 0.35  # initial quantisation step at a price of 1, in deviations of the latent


class Encoder(Protocol):
    """Images (or features that a recipe has precomputed) -> latent, at a width."""

    def __call__(self, x_BCHW: Tensor, width: int) -> Tensor: ...


@dataclass(frozen=True)
class DistilBatch:
    """Views; the teacher's features after the last cut, half-way through the tail, before the classifier; targets."""

    inputs_BCHW: Tensor
    features_BCHW: Tensor
    middle_BCHW: Tensor
    last_BCHW: Tensor
    wanted_BK: Tensor  # probabilities of the teacher
    target_BK: Tensor  # probabilities of the annotators
    width: int = 0
    ramp: float = 1.0  # factor of the price of bytes; the full price from the start collapses the latent for good


def ramp(epoch: int, epochs: int) -> float:
    """Factor of the price of bytes: grows geometrically from 1/500 to 1 over the first `epochs`."""
    return float(500 ** min(epoch / epochs - 1, 0.0))


class BottleneckModel(nn.Module):
    """A bottleneck in training. The tail is the teacher's, fused, and frozen until `free_tail` is called."""

    def __init__(
        self,
        encoder: nn.Module,
        rates: Rates,
        decoder: nn.Module,
        blocks: nn.Sequential,
        entry: int,
        weights: LossWeights,
        *,
        settled: bool = False,
    ) -> None:
        """`blocks`: the teacher's, from where the decoder joins; the tail starts `entry` blocks later.

        `settled`: the encoder is already trained, and its batch norms keep their statistics.
        """
        super().__init__()
        self.settled = settled
        self.encoder, self.rates, self.decoder, self.weights = encoder, rates, decoder, weights
        fused = fuse_batch_norms(deepcopy(blocks).eval()).requires_grad_(False)
        half = entry + (len(fused) - entry) // 2
        self.between = fused[:entry]
        self.tail = nn.ModuleList([fused[entry:half], fused[half:-1], fused[-1]])

    def free_tail(self) -> None:
        """Unfreeze the pointwise convolutions and the classifier after the decoder."""
        for part, lr_scale in ((self.between, BETWEEN_LR), (self.tail, TAIL_LR)):
            for module in part.modules():
                if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1):
                    module.requires_grad_(True)
                    for parameter in module.parameters():
                        parameter.lr_scale = lr_scale  # type: ignore[attr-defined]

    def freeze_encoder(self) -> None:
        """Freeze encoder and rates, which determine the bytes."""
        self.encoder.requires_grad_(False)
        self.rates.requires_grad_(False)

    def train(self, mode: bool = True) -> BottleneckModel:
        """Frozen modules stay in eval mode."""
        super().train(mode)
        for module in (module for child in self.children() for module in child.modules()):
            if not any(p.requires_grad for p in module.parameters()):
                module.eval()
        if self.settled:
            self.encoder.eval()
        return self

    def whole_tail(self) -> nn.Sequential:
        """The blocks after the last cut as one sequence."""
        first, second, classifier = self.tail
        return nn.Sequential(*first.children(), *second.children(), classifier)

    def decode(self, latent_BCHW: Tensor, rate_B: Tensor) -> Tensor:
        """Features after the last cut, from the dequantised latent."""
        features_BCHW: Tensor = self.between(self.decoder(latent_BCHW, rate_B))
        return features_BCHW

    def loss(self, batch: DistilBatch) -> tuple[Tensor, dict[str, float]]:
        """Loss and metrics of one batch, whose inputs take the rates in turn."""
        rate_B = torch.arange(len(batch.inputs_BCHW)) % len(self.rates.per_kilobyte)
        with torch.autocast("cpu", torch.bfloat16):
            latent_BCHW = self.encoder(batch.inputs_BCHW, batch.width)
        bits_B, latent_BCHW = self.rates(latent_BCHW, rate_B)
        with torch.autocast("cpu", torch.bfloat16):
            features_BCHW = self.decode(latent_BCHW, rate_B)
            middle_BCHW = self.tail[0](features_BCHW)
            last_BCHW = self.tail[1](middle_BCHW)
            logits_BK = self.tail[2](last_BCHW).float()
        pairs = (
            (batch.features_BCHW, features_BCHW),
            (batch.middle_BCHW, middle_BCHW),
            (batch.last_BCHW, last_BCHW),
        )
        distance = torch.stack([relative_distance(requested, got) for requested, got in pairs]).mean()
        task = answer_loss(logits_BK, batch.wanted_BK, batch.target_BK, self.weights.labels)
        price, bytes_each = self.rates.price(bits_B, rate_B)
        agree = (logits_BK.argmax(1) == batch.wanted_BK.argmax(1)).float().mean()
        figures = {"task": task.item(), "agree": agree.item(), "features": distance.item(), **bytes_each}
        loss = self.weights.task * task + self.weights.features * distance + batch.ramp * price
        return loss, figures


def new_bottleneck(
    split: SplitClassifier,
    tap: TapArchitecture,
    encoder: nn.Module,
    per_kilobyte: tuple[float, ...],
    compared_at: int,
    *,
    settled: bool,
) -> BottleneckModel:
    """A copy of a trained encoder and of the blocks that take its features, with an untrained decoder between them.

    `compared_at`: the block before which features are first compared with the teacher's.
    """
    outputs = split.backbone.channels[tap.rejoin - 1]
    decoder = DenseDecoder(tap.latent_channels, outputs, tap.decoder_channels, len(per_kilobyte))
    gains = (log_gain(per_kilobyte[0]), log_gain(per_kilobyte[-1]))
    return BottleneckModel(
        deepcopy(encoder),
        Rates(tap.latent_channels, per_kilobyte, lr_scale=10.0, log_gains=gains, hard=True),
        decoder,
        split.backbone.section(tap.rejoin),
        compared_at - tap.rejoin,
        LossWeights(),
        settled=settled,
    )


def log_gain(per_kilobyte: float) -> float:
    """Initial log gain of a rate: the higher the price, the coarser the steps."""
    return -math.log(STEP_AT_ONE) - PRICE_POWER * math.log(per_kilobyte)


def batch_of(arrays: dict[str, Tensor], inputs: str, defect_B: Tensor) -> DistilBatch:
    """A batch from arrays of views (`inputs` names the encoder's) and the annotators' probability of a defect."""
    return DistilBatch(
        inputs_BCHW=arrays[inputs],
        features_BCHW=arrays["features"],
        middle_BCHW=arrays["middle"],
        last_BCHW=arrays["last"],
        wanted_BK=arrays["logits"].softmax(1),
        target_BK=torch.stack([1 - defect_B, defect_B], 1),
    )
