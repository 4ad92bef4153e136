"""Distil a student, a model of fewer layers, from the likely tokens of its teacher, with weights of 4 bits throughout.

    ids_BT -> embedding -> x_BTH -> layers, fake-quantised -> norm -> h_BTH -> the teacher's output head -> loss

Embedding and output head are the teacher's, quantised once, and not trained. A weight is rounded to 4 bits in the
forward pass, and its gradient is that of the rounded one (straight-through estimator): what is measured is what is
stored.

Texts are made while the student learns: each piece adds NEW_PARTS files of chats and trains on them and on REPLAYED
others. Source: Shortened LLaMA (Kim et al., 2024), FastDraft (Zafrir et al., 2024); Jacob et al. (2018) for training
with rounded weights.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from isthmus.models.language.architecture import LlamaConfig
from isthmus.models.language.packing import STORED_BLOCK
from isthmus.models.recipes.common.trainer import Run, Schedule
from isthmus.models.recipes.language.exits import head_loss
from isthmus.models.recipes.language.llama import Layer, Llama
from isthmus.models.recipes.language.student_start import before_down, padded
from isthmus.models.recipes.language.teacher import TeacherOutputs, random_batches

NEW_PARTS, REPLAYED = 2, 4  # files of texts of a piece
STEP_TOKENS = 640
PEAK_LR = 1e-3

PartOf = Callable[[int], TeacherOutputs]  # the file of texts of a number, made where missing


class Rounded(torch.autograd.Function):
    """Weights (O, I) rounded to 4 bits as a bundle stores them; the gradient passes unchanged."""

    @staticmethod
    def forward(ctx: object, weight_OI: Tensor) -> Tensor:
        return rounded(weight_OI)

    @staticmethod
    def backward(ctx: object, gradient_OI: Tensor) -> Tensor:
        return gradient_OI


def rounded(weight_OI: Tensor) -> Tensor:
    """What a bundle's codes and scales of a matrix stand for, see `packing.quantise_symmetric4`."""
    blocks_OGB = weight_OI.view(len(weight_OI), -1, STORED_BLOCK)
    low_OG1, high_OG1 = blocks_OGB.aminmax(dim=-1, keepdim=True)
    scale_OG1 = (torch.where(high_OG1 > -low_OG1, high_OG1, low_OG1) / -8).half().float()
    codes_OGB: Tensor = (blocks_OGB / torch.where(scale_OG1 == 0, 1, scale_OG1)).round_().clamp_(-8, 7)
    return (codes_OGB * scale_OG1).flatten(1)


class RoundedLayer(Layer):
    """A decoder layer whose matrices are used as they will be stored."""

    def weight(self, name: str) -> Tensor:
        weight = super().weight(name)
        found: Tensor = Rounded.apply(weight) if weight.ndim == 2 else weight  # type: ignore[no-untyped-call]
        return found


class Student(nn.Module):
    """Token ids -> normed hidden states for the output head. Only layers and norm are trained."""

    def __init__(self, config: LlamaConfig, embedding_VH: Tensor) -> None:
        super().__init__()
        self.eps = config.norm_eps
        self.register_buffer("embedding_VH", embedding_VH, persistent=False)
        self.layers: Sequence[Layer] = nn.ModuleList(RoundedLayer(config) for _ in range(config.layers))  # type: ignore[assignment]
        self.norm_H = nn.Parameter(torch.ones(config.hidden))

    def forward(self, ids_BT: Tensor) -> Tensor:
        x_BTH = F.embedding(ids_BT, self.embedding_VH).float()  # type: ignore[arg-type]
        for layer in self.layers:
            x_BTH, active_BTI = before_down(layer, x_BTH)
            x_BTH = x_BTH + F.linear(active_BTI, layer.weight("mlp.down_proj")).float()
        return F.rms_norm(x_BTH, self.norm_H.shape, self.norm_H, self.eps)


def student_of(started: Llama) -> tuple[Student, Tensor]:
    """A student with the values of `started`, and its output head (V, H) in bfloat16."""
    embedding_VH = rounded(started.embedding_VH.detach().float()).bfloat16()
    head_VH = embedding_VH if started.config.tied else rounded(started.head_VH.detach().float()).bfloat16()
    student = Student(started.config, embedding_VH)
    for own, theirs in zip(student.layers, started.layers, strict=True):
        own.load_state_dict(theirs.state_dict())
    student.norm_H.data.copy_(started.norm_H)
    return student.requires_grad_(True), head_VH


@dataclass(frozen=True)
class Batch:
    """Sequences padded at the end, and the teacher's tokens for M positions of them."""

    ids_BT: Tensor
    learnt_BT: Tensor  # whether the teacher's tokens are known
    top_MK: Tensor
    weight_MK: Tensor  # probabilities


def batches(outputs: TeacherOutputs, generator: torch.Generator) -> Iterator[Batch]:
    """As `random_batches`, of all sequences."""
    for group in random_batches(outputs, range(len(outputs)), generator, STEP_TOKENS):
        spans = [slice(*outputs.bounds(s)) for s in group]
        learnt = [outputs.logprobs_NK[span, 0].isfinite() for span in spans]
        yield Batch(
            padded([outputs.ids_N[span] for span in spans]),
            padded(learnt),
            torch.cat([outputs.top_NK[span][known] for span, known in zip(spans, learnt, strict=True)]).long(),
            torch.cat([outputs.logprobs_NK[span][known] for span, known in zip(spans, learnt, strict=True)])
            .float()
            .exp(),
        )


def parts_of_piece(number: int) -> list[int]:
    """Numbers of the files of texts of a piece: new ones, and some earlier ones."""
    fresh = range(number * NEW_PARTS, (number + 1) * NEW_PARTS)
    return [*fresh, *random.Random(number).sample(range(fresh.start), min(REPLAYED, fresh.start))]


def distil(run: Run, stage: str, student: Student, head_VH: Tensor, part_of: PartOf, pieces: int) -> Student:
    """Train in place, and return the moving average of the weights."""

    def loss_of(batch: Batch) -> tuple[Tensor, dict[str, float]]:
        with torch.autocast("cpu", torch.bfloat16):
            h_MH = student(batch.ids_BT)[batch.learnt_BT]
        return head_loss(h_MH, head_VH, batch.top_MK, batch.weight_MK)

    def piece(number: int, generator: torch.Generator) -> Iterator[Batch]:
        return batches(TeacherOutputs.concatenate([part_of(index) for index in parts_of_piece(number)]), generator)

    steps = max((NEW_PARTS + REPLAYED) * part_of(0).ends[-1] // STEP_TOKENS, 1)
    schedule = Schedule(pieces, steps, PEAK_LR, warmup_epochs=0.5, weight_decay=0.01, ema_decay=0.99)
    finished = run.fit(stage, student, piece, loss_of, schedule)
    if not isinstance(finished, Student):
        raise TypeError("fit returned another module")
    return finished
