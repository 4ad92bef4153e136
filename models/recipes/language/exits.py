"""Exits of a language model: what all layers would say, guessed by a layer or two behind the first few.

    x_BTH behind layer k -> linear map -> n decoder layers -> norm -> the model's own output head -> logits

The layers begin as the model's last n, the map as the ridge regression onto what the first of these takes, the norm as
the model's. A second, small head says how likely the exit's choice is the full model's.

Source: EE-Tuning (Pan et al., 2024) for exits on a frozen backbone; Kangaroo (Liu et al., 2024) for few layers and the
shared output head; Jean et al. (2015) for the softmax over part of a vocabulary; closed-form start and learnt
correctness are ours.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional as F

from isthmus.models.language.architecture import LlamaConfig
from isthmus.models.recipes.common.ridge import affine_ridge
from isthmus.models.recipes.common.trainer import Run, Schedule
from isthmus.models.recipes.language.llama import Layer, Llama
from isthmus.models.recipes.language.text import Texts

BATCH_TOKENS = 2048
TEACHER_TOKENS = 16  # likeliest ones whose probabilities are learnt from
RIDGE = 1e-2  # of the mean variance
HEAD_ROWS = 512  # of the output head at once
AGREEMENT_ROWS = 64  # of a batch, whose agreement is logged
DRAWN_TOKENS = 4096  # of a step, that stand for all but the teacher's
EPOCHS, PEAK_LR = 4, 1.5e-3


@dataclass(frozen=True)
class Traces:
    """What a model made of sequences: rows behind some layers, and its likeliest next tokens.

    rows: layer count -> (N, H). top_NK ids and logprobs_NK of the full model. ends: of each sequence.
    """

    rows: dict[int, Tensor]
    top_NK: Tensor
    logprobs_NK: Tensor
    ids_N: Tensor
    ends: tuple[int, ...]
    answers: tuple[int, ...]

    @classmethod
    def joined(cls, parts: Sequence[Traces]) -> Traces:
        """Several one after another."""
        offsets = [0, *itertools.accumulate(part.ends[-1] for part in parts)][:-1]
        return cls(
            {depth: torch.cat([part.rows[depth] for part in parts]) for depth in parts[0].rows},
            torch.cat([part.top_NK for part in parts]),
            torch.cat([part.logprobs_NK for part in parts]),
            torch.cat([part.ids_N for part in parts]),
            tuple(offset + end for offset, part in zip(offsets, parts, strict=True) for end in part.ends),
            tuple(offset + answer for offset, part in zip(offsets, parts, strict=True) for answer in part.answers),
        )

    def __len__(self) -> int:
        return len(self.ends)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sequence."""
        return [end - start for start, end in map(self.bounds, range(len(self)))]

    @property
    def later_N(self) -> Tensor:
        """Of every position, whether it is not the first of its sequence."""
        later_N = torch.ones(self.ends[-1], dtype=torch.bool)
        later_N[[0, *self.ends[:-1]]] = False
        return later_N

    def bounds(self, sequence: int) -> tuple[int, int]:
        return (self.ends[sequence - 1] if sequence else 0), self.ends[sequence]


@torch.inference_mode()
def trace(model: Llama, texts: Texts, depths: Sequence[int], dtype: torch.dtype = torch.bfloat16) -> Traces:
    """Run sequences of similar length together; `depths` in layers, from 0, the embedding, to all; `dtype` of rows."""
    ends = texts.ends_S.tolist()
    starts = [0, *ends[:-1]]
    total, hidden = len(texts.ids_N), model.config.hidden
    rows = {depth: torch.empty(total, hidden, dtype=dtype) for depth in depths}
    top_NK = torch.empty(total, TEACHER_TOKENS, dtype=torch.int32)
    logprobs_NK = torch.empty(total, TEACHER_TOKENS)
    ids_N = torch.from_numpy(texts.ids_N.astype("int64"))
    lengths = [end - start for start, end in zip(starts, ends, strict=True)]
    for batch in track(list(grouped(sorted(range(len(ends)), key=lengths.__getitem__), lengths)), "full model"):
        ids_BT = nn.utils.rnn.pad_sequence([ids_N[starts[s] : ends[s]] for s in batch], batch_first=True)
        x_BTH = model.embed(ids_BT)
        kept = {0: x_BTH}
        for index, layer in enumerate(model.layers):
            x_BTH, _ = layer(x_BTH)
            kept[index + 1] = x_BTH
        for row, s in enumerate(batch):
            here, length = slice(starts[s], ends[s]), lengths[s]
            for depth in depths:
                rows[depth][here] = kept[depth][row, :length]
            logprobs_TV = model.logits(x_BTH[row, :length]).float().log_softmax(-1)
            logprobs_NK[here], top_NK[here] = logprobs_TV.topk(TEACHER_TOKENS)
    return Traces(rows, top_NK, logprobs_NK, ids_N, tuple(ends), tuple(texts.answers_S.tolist()))


def grouped(order: Sequence[int], lengths: Sequence[int]) -> Iterator[list[int]]:
    """Sequences in this order, together as long as they stay below BATCH_TOKENS with padding."""
    batch: list[int] = []
    for sequence in order:
        longest = max(lengths[other] for other in [*batch, sequence])
        if batch and longest * (len(batch) + 1) > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(sequence)
    if batch:
        yield batch


class Exit(nn.Module):
    """Rows behind layer `depth` -> rows that the output head can read."""

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


def start(exit_: Exit, model: Llama, traces: Traces) -> None:
    """Make an exit the best linear guess of what the last layers take, and these layers."""
    first = model.config.layers - len(exit_.layers)
    weight_OI, bias_O = affine_ridge(traces.rows[exit_.depth].float(), traces.rows[first].float(), RIDGE)
    with torch.no_grad():
        exit_.map.weight.copy_(weight_OI)
        exit_.map.bias.copy_(bias_O)
        exit_.norm_H.copy_(model.norm_H)
    for own, theirs in zip(exit_.layers, list(model.layers)[first:], strict=True):
        own.load_state_dict(theirs.state_dict())
    exit_.requires_grad_(True)


@dataclass(frozen=True)
class Batch:
    """Sequences padded to one length: rows behind the exit's layer, and where each token stands in the traces."""

    x_BTH: Tensor
    places_M: Tensor  # of real tokens, in the traces
    real_BT: Tensor


def batches(traces: Traces, depth: int, chosen: Sequence[int], generator: torch.Generator) -> Iterator[Batch]:
    """All chosen sequences once, in random order, those of similar length together."""
    lengths = traces.lengths
    jitter = (1 + 0.2 * torch.rand(len(traces), generator=generator)).tolist()
    order = sorted(chosen, key=lambda s: lengths[s] * jitter[s])
    groups = list(grouped(order, lengths))
    for index in torch.randperm(len(groups), generator=generator).tolist():
        spans = [traces.bounds(s) for s in groups[index]]
        parts = [traces.rows[depth][start:end].float() for start, end in spans]
        real = [torch.ones(len(part), dtype=torch.bool) for part in parts]
        yield Batch(
            nn.utils.rnn.pad_sequence(parts, batch_first=True),
            torch.cat([torch.arange(start, end) for start, end in spans]),
            nn.utils.rnn.pad_sequence(real, batch_first=True),
        )


@dataclass(frozen=True)
class Drawn:
    """Part of a vocabulary: ids, what is added to their logits, and where in it the teacher's tokens are."""

    ids_V: Tensor
    shift_V: Tensor
    top_MK: Tensor


def drawn(top_MK: Tensor, vocab: int, count: int) -> Drawn:
    """The teacher's tokens of all rows and `count` others by chance, which stand for all that are not there."""
    own_V, places_MK = torch.unique(top_MK, return_inverse=True)
    others = torch.ones(vocab, dtype=torch.bool)
    others[own_V] = False
    others_V = others.nonzero()[:, 0]
    some_V = others_V[torch.randperm(len(others_V))[:count]]
    shift_V = torch.zeros(len(own_V) + len(some_V))
    shift_V[len(own_V) :] = math.log(max(len(others_V), 1) / max(len(some_V), 1))
    return Drawn(torch.cat([own_V, some_V]), shift_V, places_MK)


class HeadLoss(torch.autograd.Function):
    """Cross-entropy of the output head's answers to rows (M, H), without ever holding (M, vocab) of them at once.

    The gradient is worked out on the way forward: probabilities are formed, used and overwritten chunk by chunk, which
    on a CPU is thirty times as fast as autograd over the whole.
    """

    @staticmethod
    def forward(ctx: Any, h_MH: Tensor, head_VH: Tensor, shift_V: Tensor, top_MK: Tensor, weight_MK: Tensor) -> Tensor:
        """`shift_V` is added to logits; `top_MK` ids and `weight_MK` probabilities they should have; mean over rows."""
        rows_MH, shift_V = h_MH.to(head_VH.dtype), shift_V.to(head_VH.dtype)
        gradient_MH = torch.empty_like(rows_MH)
        loss = torch.zeros(())
        for start in range(0, len(rows_MH), HEAD_ROWS):
            here = slice(start, start + HEAD_ROWS)
            likely_MV = torch.softmax(F.linear(rows_MH[here], head_VH, shift_V), 1)
            own_MK = likely_MV.gather(1, top_MK[here]).float().clamp(min=1e-9)
            loss -= (weight_MK[here] * own_MK.log()).sum()
            likely_MV *= weight_MK[here].sum(1, keepdim=True)
            likely_MV.scatter_add_(1, top_MK[here], -weight_MK[here].to(likely_MV.dtype))
            gradient_MH[here] = likely_MV @ head_VH
        ctx.save_for_backward(gradient_MH.float() / len(rows_MH))
        return loss / len(rows_MH)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        (gradient_MH,) = ctx.saved_tensors
        return gradients[0] * gradient_MH, None, None, None, None


def train(run: Run, exit_: Exit, model: Llama, traces: Traces, chosen: Sequence[int]) -> Exit:
    """Distil one exit from the full model's likeliest tokens; returns the averaged one."""
    head_VH = model.embedding_VH

    def loss_of(batch: Batch) -> tuple[Tensor, dict[str, float]]:
        with torch.autocast("cpu", torch.bfloat16):
            h_MH = exit_(batch.x_BTH)[batch.real_BT]
        top_MK = traces.top_NK[batch.places_M].long()
        part, weight_MK = drawn(top_MK, len(head_VH), DRAWN_TOKENS), traces.logprobs_NK[batch.places_M].exp()
        loss: Tensor = HeadLoss.apply(h_MH, head_VH[part.ids_V], part.shift_V, part.top_MK, weight_MK)  # type: ignore[no-untyped-call]
        some_MH = h_MH.detach()[:: len(h_MH) // AGREEMENT_ROWS + 1].to(head_VH.dtype)
        agree = F.linear(some_MH, head_VH).argmax(1) == top_MK[:: len(h_MH) // AGREEMENT_ROWS + 1, 0]
        return loss, {"agree": float(agree.float().mean())}

    def epoch_batches(epoch: int, generator: torch.Generator) -> Iterator[Batch]:
        return batches(traces, exit_.depth, chosen, generator)

    steps = sum(1 for _ in epoch_batches(0, torch.Generator().manual_seed(0)))
    schedule = Schedule(EPOCHS, steps, PEAK_LR, warmup_epochs=0.2, weight_decay=0.01)
    finished = run.fit(f"exit{exit_.depth}", exit_, epoch_batches, loss_of, schedule)
    if not isinstance(finished, Exit):
        raise TypeError("fit returned another module")
    return finished
