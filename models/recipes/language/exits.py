"""Train exits, which predict the full model's next token from a lower layer with one or two decoder layers.

    x_BTH at a depth -> linear map -> n decoder layers -> norm -> the model's own output head -> logits

The layers are initialised with the model's last n, the map with the ridge regression onto the input of the first of
these, the norm with the model's. `confidence_head` then learns how likely the exit's choice is the full model's.

Source: EE-Tuning (Pan et al., 2024) for exits on a frozen backbone; Kangaroo (Liu et al., 2024) for few layers and a
shared output head; Jean et al. (2015) for the softmax over part of a vocabulary. Closed-form initialisation is ours.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from isthmus.models.language.architecture import LlamaConfig
from isthmus.models.recipes.common.ridge import affine_ridge
from isthmus.models.recipes.common.trainer import Run, Schedule
from isthmus.models.recipes.language.llama import Layer, Llama
from isthmus.models.recipes.language.teacher import TeacherOutputs, random_batches

RIDGE = 1e-2  # of the mean variance
HEAD_ROWS = 512  # positions for which the output head is computed at once
AGREEMENT_ROWS = 64  # positions of a batch whose agreement is logged
SAMPLED_TOKENS = 4096  # of the vocabulary in a step, which stand for all but the teacher's
EPOCHS, PEAK_LR = 4, 1.5e-3


class Exit(nn.Module):
    """Hidden states at `depth` -> normed hidden states for the output head."""

    def __init__(self, config: LlamaConfig, depth: int, layers: int) -> None:
        super().__init__()
        self.depth = depth
        self.eps = config.norm_eps
        self.map = nn.Linear(config.hidden, config.hidden)
        self.layers: Sequence[Layer] = nn.ModuleList(Layer(config) for _ in range(layers))  # type: ignore[assignment]
        self.norm_H = nn.Parameter(torch.ones(config.hidden))

    def forward(self, x_BTH: Tensor) -> Tensor:
        x_BTH = self.map(x_BTH)
        for layer in self.layers:
            x_BTH, _ = layer(x_BTH)
        return F.rms_norm(x_BTH.float(), self.norm_H.shape, self.norm_H, self.eps)


def initialise(exit_: Exit, model: Llama, teacher: TeacherOutputs) -> None:
    """Initialise an exit with the best linear prediction of the last layers' input, and with these layers."""
    first = model.config.layers - len(exit_.layers)
    weight_OI, bias_O = affine_ridge(teacher.states[exit_.depth].float(), teacher.states[first].float(), RIDGE)
    with torch.no_grad():
        exit_.map.weight.copy_(weight_OI)
        exit_.map.bias.copy_(bias_O)
        exit_.norm_H.copy_(model.norm_H)
    for own, theirs in zip(exit_.layers, list(model.layers)[first:], strict=True):
        own.load_state_dict(theirs.state_dict())
    exit_.requires_grad_(True)


@dataclass(frozen=True)
class Batch:
    """Sequences padded to one length: hidden states at the exit's depth, and each token's position."""

    x_BTH: Tensor
    positions_M: Tensor  # of real tokens, in the teacher's outputs
    real_BT: Tensor


def batches(teacher: TeacherOutputs, depth: int, chosen: Sequence[int], generator: torch.Generator) -> Iterator[Batch]:
    """As `random_batches`."""
    for group in random_batches(teacher, chosen, generator):
        spans = [teacher.bounds(s) for s in group]
        parts = [teacher.states[depth][start:end].float() for start, end in spans]
        real = [torch.ones(len(part), dtype=torch.bool) for part in parts]
        yield Batch(
            nn.utils.rnn.pad_sequence(parts, batch_first=True),
            torch.cat([torch.arange(start, end) for start, end in spans]),
            nn.utils.rnn.pad_sequence(real, batch_first=True),
        )


@dataclass(frozen=True)
class SampledVocab:
    """Part of a vocabulary: token ids, offsets of their logits, and the indices of the teacher's tokens in it."""

    ids_V: Tensor
    shift_V: Tensor
    top_MK: Tensor


def sample_vocab(top_MK: Tensor, vocab: int, count: int) -> SampledVocab:
    """All of the teacher's tokens and `count` random others, whose offset makes them stand for all that are missing."""
    own_V, indices_MK = torch.unique(top_MK, return_inverse=True)
    others = torch.ones(vocab, dtype=torch.bool)
    others[own_V] = False
    others_V = others.nonzero()[:, 0]
    some_V = others_V[torch.randperm(len(others_V))[:count]]
    shift_V = torch.zeros(len(own_V) + len(some_V))
    shift_V[len(own_V) :] = math.log(max(len(others_V), 1) / max(len(some_V), 1))
    return SampledVocab(torch.cat([own_V, some_V]), shift_V, indices_MK)


class HeadLoss(torch.autograd.Function):
    """Cross-entropy of the output head on hidden states (M, H), without holding all (M, vocab) logits at once.

    The gradient is computed in the forward pass: probabilities are computed, used and overwritten in chunks, which on a
    CPU is thirty times as fast as autograd over all of them.
    """

    @staticmethod
    def forward(ctx: Any, h_MH: Tensor, head_VH: Tensor, shift_V: Tensor, top_MK: Tensor, weight_MK: Tensor) -> Tensor:
        """The mean loss. `shift_V`: added to the logits. `top_MK`, `weight_MK`: the teacher's ids and probabilities."""
        rows_MH, shift_V = h_MH.to(head_VH.dtype), shift_V.to(head_VH.dtype)
        gradient_MH = torch.empty_like(rows_MH)
        loss = torch.zeros(())
        for start in range(0, len(rows_MH), HEAD_ROWS):
            here = slice(start, start + HEAD_ROWS)
            probability_MV = torch.softmax(F.linear(rows_MH[here], head_VH, shift_V), 1)
            own_MK = probability_MV.gather(1, top_MK[here]).float().clamp(min=1e-9)
            loss -= (weight_MK[here] * own_MK.log()).sum()
            probability_MV *= weight_MK[here].sum(1, keepdim=True)
            probability_MV.scatter_add_(1, top_MK[here], -weight_MK[here].to(probability_MV.dtype))
            gradient_MH[here] = probability_MV @ head_VH
        ctx.save_for_backward(gradient_MH.float() / len(rows_MH))
        return loss / len(rows_MH)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        (gradient_MH,) = ctx.saved_tensors
        return gradients[0] * gradient_MH, None, None, None, None


def head_loss(h_MH: Tensor, head_VH: Tensor, top_MK: Tensor, weight_MK: Tensor) -> tuple[Tensor, dict[str, float]]:
    """The loss of hidden states against the teacher's ids and probabilities, and on some rows how many agree."""
    part = sample_vocab(top_MK, len(head_VH), SAMPLED_TOKENS)
    loss: Tensor = HeadLoss.apply(h_MH, head_VH[part.ids_V], part.shift_V, part.top_MK, weight_MK)  # type: ignore[no-untyped-call]
    some = slice(None, None, len(h_MH) // AGREEMENT_ROWS + 1)
    agree = F.linear(h_MH.detach()[some].to(head_VH.dtype), head_VH).argmax(1) == top_MK[some, 0]
    return loss, {"agree": float(agree.float().mean())}


def train_exit(run: Run, exit_: Exit, model: Llama, teacher: TeacherOutputs, chosen: Sequence[int]) -> Exit:
    """Distil an exit from the full model's most likely tokens; returns the moving average of its weights."""
    head_VH = model.embedding_VH

    def loss_of(batch: Batch) -> tuple[Tensor, dict[str, float]]:
        with torch.autocast("cpu", torch.bfloat16):
            h_MH = exit_(batch.x_BTH)[batch.real_BT]
        top_MK = teacher.top_NK[batch.positions_M].long()
        return head_loss(h_MH, head_VH, top_MK, teacher.logprobs_NK[batch.positions_M].exp())

    def epoch_batches(epoch: int, generator: torch.Generator) -> Iterator[Batch]:
        return batches(teacher, exit_.depth, chosen, generator)

    steps = sum(1 for _ in epoch_batches(0, torch.Generator().manual_seed(0)))
    schedule = Schedule(EPOCHS, steps, PEAK_LR, warmup_epochs=0.2, weight_decay=0.01)
    finished = run.fit(f"exit{exit_.depth}", exit_, epoch_batches, loss_of, schedule)
    if not isinstance(finished, Exit):
        raise TypeError("fit returned another module")
    return finished
