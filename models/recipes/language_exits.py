"""Exits of a language model: what all layers would say, guessed by one layer behind the first few.

    x_BTH behind layer k -> linear map -> one decoder layer -> norm -> the model's own output head -> logits

The map begins as the ridge regression onto what the last layer takes, the layer as that last layer, the norm as the
model's. A second, small head says how likely the exit's choice is the full model's.

Source: EE-Tuning (Pan et al., 2024) for exits on a frozen backbone; Kangaroo (Liu et al., 2024) for one layer and the
shared output head; closed-form start and learnt correctness are ours.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional as F

from models.language.architecture import LlamaConfig
from models.recipes.language_text import Texts
from models.recipes.llama import Layer, Llama
from models.recipes.trainer import Run, Schedule

BATCH_TOKENS = 2048
TEACHER_TOKENS = 16  # likeliest ones whose probabilities are learnt from
RIDGE = 1e-2  # of the mean variance
EPOCHS, PEAK_LR = 4, 4e-4


@dataclass(frozen=True)
class Traces:
    """What a model made of sequences: rows behind some layers, and its likeliest next tokens.

    rows: layer count -> (N, H) bfloat16. top_NK ids and logprobs_NK of the full model. ends: of each sequence.
    """

    rows: dict[int, Tensor]
    top_NK: Tensor
    logprobs_NK: Tensor
    ids_N: Tensor
    ends: tuple[int, ...]
    answers: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.ends)

    def bounds(self, sequence: int) -> tuple[int, int]:
        return (self.ends[sequence - 1] if sequence else 0), self.ends[sequence]


@torch.inference_mode()
def trace(model: Llama, texts: Texts, depths: Sequence[int]) -> Traces:
    """Run sequences of similar length together; `depths` in layers, from 0, the embedding, to all."""
    ends = texts.ends_S.tolist()
    starts = [0, *ends[:-1]]
    total, hidden = len(texts.ids_N), model.config.hidden
    rows = {depth: torch.empty(total, hidden, dtype=torch.bfloat16) for depth in depths}
    top_NK = torch.empty(total, TEACHER_TOKENS, dtype=torch.int32)
    logprobs_NK = torch.empty(total, TEACHER_TOKENS)
    ids_N = torch.from_numpy(texts.ids_N.astype("int64"))
    order = sorted(range(len(ends)), key=lambda s: ends[s] - starts[s])
    for batch in track(list(packed(order, [ends[s] - starts[s] for s in range(len(ends))])), "full model"):
        ids_BT = nn.utils.rnn.pad_sequence([ids_N[starts[s] : ends[s]] for s in batch], batch_first=True)
        x_BTH = model.embed(ids_BT)
        kept = {0: x_BTH}
        for index, layer in enumerate(model.layers):
            x_BTH, _ = layer(x_BTH)
            kept[index + 1] = x_BTH
        for row, s in enumerate(batch):
            here, length = slice(starts[s], ends[s]), ends[s] - starts[s]
            for depth in depths:
                rows[depth][here] = kept[depth][row, :length]
            logprobs_TV = model.logits(x_BTH[row, :length]).float().log_softmax(-1)
            logprobs_NK[here], top_NK[here] = logprobs_TV.topk(TEACHER_TOKENS)
    return Traces(rows, top_NK, logprobs_NK, ids_N, tuple(ends), tuple(texts.answers_S.tolist()))


def packed(order: Sequence[int], lengths: Sequence[int]) -> Iterator[list[int]]:
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

    def __init__(self, config: LlamaConfig, depth: int) -> None:
        super().__init__()
        self.depth = depth
        self.eps = config.norm_eps
        self.map = nn.Linear(config.hidden, config.hidden)
        self.layer = Layer(config)
        self.norm_H = nn.Parameter(torch.ones(config.hidden))

    def forward(self, x_BTH: Tensor) -> Tensor:
        y_BTH, _ = self.layer(self.map(x_BTH))
        return F.rms_norm(y_BTH, self.norm_H.shape, self.norm_H, self.eps)


def start(exit_: Exit, model: Llama, traces: Traces, depth: int) -> None:
    """Make an exit the best linear guess of what the last layer takes, and that layer."""
    weight_OI, bias_O = ridge(traces.rows[depth].float(), traces.rows[model.config.layers - 1].float())
    with torch.no_grad():
        exit_.map.weight.copy_(weight_OI)
        exit_.map.bias.copy_(bias_O)
        exit_.norm_H.copy_(model.norm_H)
    exit_.layer.load_state_dict(model.layers[-1].state_dict())
    exit_.requires_grad_(True)


def ridge(x_NI: Tensor, y_NO: Tensor) -> tuple[Tensor, Tensor]:
    """Weight (O, I) and bias (O,) of the regression of y on x."""
    x_mean_I, y_mean_O = x_NI.mean(0), y_NO.mean(0)
    x_NI, y_NO = (x_NI - x_mean_I).double(), (y_NO - y_mean_O).double()
    gram_II = x_NI.T @ x_NI
    gram_II.diagonal().add_(RIDGE * gram_II.diagonal().mean())
    weight_OI = torch.linalg.solve(gram_II, x_NI.T @ y_NO).T.float()
    return weight_OI, y_mean_O - weight_OI @ x_mean_I


@dataclass(frozen=True)
class Batch:
    """Sequences padded to one length: rows behind the exit's layer, and where each token stands in the traces."""

    x_BTH: Tensor
    places_M: Tensor  # of real tokens, in the traces
    real_BT: Tensor


def batches(traces: Traces, depth: int, chosen: Sequence[int], generator: torch.Generator) -> Iterator[Batch]:
    """All chosen sequences once, in random order, those of similar length together."""
    lengths = [end - start for start, end in map(traces.bounds, range(len(traces)))]
    jitter = (1 + 0.2 * torch.rand(len(traces), generator=generator)).tolist()
    order = sorted(chosen, key=lambda s: lengths[s] * jitter[s])
    groups = list(packed(order, lengths))
    for index in torch.randperm(len(groups), generator=generator).tolist():
        spans = [traces.bounds(s) for s in groups[index]]
        parts = [traces.rows[depth][start:end].float() for start, end in spans]
        real = [torch.ones(len(part), dtype=torch.bool) for part in parts]
        yield Batch(
            nn.utils.rnn.pad_sequence(parts, batch_first=True),
            torch.cat([torch.arange(start, end) for start, end in spans]),
            nn.utils.rnn.pad_sequence(real, batch_first=True),
        )


def train(run: Run, exit_: Exit, model: Llama, traces: Traces, chosen: Sequence[int]) -> Exit:
    """Distil one exit from the full model's likeliest tokens; returns the averaged one."""
    head_VH = model.embedding_VH

    def loss_of(batch: Batch) -> tuple[Tensor, dict[str, float]]:
        with torch.autocast("cpu", torch.bfloat16):
            h_MH = exit_(batch.x_BTH)[batch.real_BT]
            logits_MV = F.linear(h_MH, head_VH)
        top_MK = traces.top_NK[batch.places_M].long()
        weight_MK = traces.logprobs_NK[batch.places_M].exp()
        own_MK = logits_MV.gather(1, top_MK).float() - logits_MV.float().logsumexp(1, keepdim=True)
        loss = -(weight_MK * own_MK).sum(1).mean()
        agree = (logits_MV.detach().argmax(1) == top_MK[:, 0]).float().mean()
        return loss, {"agree": float(agree)}

    def epoch_batches(epoch: int, generator: torch.Generator) -> Iterator[Batch]:
        return batches(traces, exit_.depth, chosen, generator)

    steps = sum(1 for _ in epoch_batches(0, torch.Generator().manual_seed(0)))
    schedule = Schedule(EPOCHS, steps, PEAK_LR, warmup_epochs=0.2, weight_decay=0.01)
    finished = run.fit(f"exit{exit_.depth}", exit_, epoch_batches, loss_of, schedule)
    if not isinstance(finished, Exit):
        raise TypeError("fit returned another module")
    return finished
