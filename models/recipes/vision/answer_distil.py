"""A bottleneck distilled from a network's own features and answers, of any kind; no labels.

map (frozen) -> encoder -> round -> decoder -> rest of the network (frozen)  <- its own features and answer, bits
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from isthmus.models.messages import TaskKind
from isthmus.models.recipes.vision.answer_loss import answer_loss, outputs_of, sampled_likelihood
from isthmus.models.recipes.vision.components import Components, normalised
from isthmus.models.recipes.vision.distil import relative_distance
from isthmus.models.recipes.vision.rates import Rates
from isthmus.models.recipes.vision.views import BATCH
from isthmus.models.vision.split import DenseDecoder

FEATURES = 0.2  # weight beside the answer's loss
HIDDEN = 96  # of the encoder's nonlinear part


class MapEncoder(nn.Module):
    """A map -> latent: a linear map, and two convolutions that are zero before training."""

    def __init__(self, inputs: int, latent: int) -> None:
        super().__init__()
        self.linear = nn.Conv2d(inputs, latent, 1)
        self.reduce = nn.Conv2d(inputs, HIDDEN, 1)
        self.correct = nn.Conv2d(HIDDEN, latent, 3, padding=1)
        nn.init.zeros_(self.correct.weight)
        nn.init.zeros_(self.correct.bias)  # type: ignore[arg-type]

    def forward(self, map_BCHW: Tensor) -> Tensor:
        latent_BCHW: Tensor = self.linear(map_BCHW) + self.correct(self.reduce(map_BCHW).relu())
        return latent_BCHW

    @torch.no_grad()
    def start(self, components: Components) -> None:
        """Begin as the components of the maps."""
        self.linear.weight.copy_(components.analyse_LC[:, :, None, None])
        assert self.linear.bias is not None
        self.linear.bias.copy_(-components.analyse_LC @ components.mean_C)


class FromLatent(nn.Module):
    """The cloud's part: latent and rate -> the network's outputs."""

    def __init__(self, decoder: DenseDecoder, rest: nn.Module) -> None:
        super().__init__()
        self.decoder, self.rest = decoder, rest

    def forward(self, latent: Tensor, rate: Tensor) -> Tensor | tuple[Tensor, ...]:
        found: Tensor | tuple[Tensor, ...] = self.rest(self.decoder(latent, rate))
        return found


@dataclass(frozen=True)
class MapBatch:
    """What crosses the cut for a batch, and the factor of the price of bytes."""

    map_BCHW: Tensor
    ramp: float = 1.0


class AnswerDistillation(nn.Module):
    """Encoder, rates and decoder in training; the rest of the network stays as it is."""

    def __init__(self, kind: TaskKind, encoder: MapEncoder, rates: Rates, decoder: DenseDecoder, heads: nn.Module):
        """`heads`: the network after the cut, from the map that crosses it."""
        super().__init__()
        self.kind = kind
        self.encoder, self.rates, self.decoder = encoder, rates, decoder
        self.heads = heads.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> AnswerDistillation:
        """The rest of the network stays in eval mode."""
        super().train(mode)
        self.heads.eval()
        return self

    def loss(self, batch: MapBatch) -> tuple[Tensor, dict[str, float]]:
        """Loss and metrics of one batch, whose inputs take the rates in turn."""
        rate_B = torch.arange(len(batch.map_BCHW)) % len(self.rates.per_kilobyte)
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                teacher = outputs_of(self.heads(batch.map_BCHW))
            latent_BCHW = self.encoder(batch.map_BCHW)
        bits_B, latent_BCHW = self.rates(latent_BCHW, rate_B)
        with torch.autocast("cpu", torch.bfloat16):
            decoded_BCHW = self.decoder(latent_BCHW, rate_B)
            student = outputs_of(self.heads(decoded_BCHW))
        task, figures = answer_loss(self.kind, teacher, student)
        distance = relative_distance(batch.map_BCHW, decoded_BCHW)
        price, bytes_each = self.rates.price(bits_B, rate_B)
        loss = task + FEATURES * distance + batch.ramp * price
        return loss, {"task": task.item(), **figures, "features": distance.item(), **bytes_each}


@torch.enable_grad()
def information(kind: TaskKind, map_NCHW: Tensor, rest: nn.Module) -> Tensor:
    """Fisher information of sampled answers in what crosses, (C, C), as `components.information`."""
    total_CC = torch.zeros(map_NCHW.shape[1], map_NCHW.shape[1])
    generator = torch.Generator().manual_seed(0)
    for chunk_BCHW in torch.split(map_NCHW, BATCH):
        inputs_BCHW = chunk_BCHW.detach().requires_grad_(True)
        likelihood = sampled_likelihood(kind, outputs_of(rest(inputs_BCHW)), generator)
        (gradient_BCHW,) = torch.autograd.grad(likelihood, inputs_BCHW)
        gradient_CN = gradient_BCHW.transpose(0, 1).flatten(1)
        total_CC += gradient_CN @ gradient_CN.T
    return normalised(total_CC)
