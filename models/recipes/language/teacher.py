"""Run the full model over sequences, and keep what exits, codec and KV fill learn from.

Corpus --full model--> hidden states at some depths, most likely next tokens with their log-probabilities
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from rich.progress import track
from torch import Tensor, nn

from isthmus.models.recipes.language.corpus import Corpus
from isthmus.models.recipes.language.llama import Llama

BATCH_TOKENS = 2048  # of a batch, with padding
TEACHER_TOKENS = 16  # most likely next tokens that are kept for each position


@dataclass(frozen=True)
class TeacherOutputs:
    """Outputs of the full model for N positions of concatenated sequences.

    states: depth -> hidden states (N, H). top_NK and logprobs_NK: ids and log-probabilities of the most likely next
    tokens. ends: end of each sequence. answers: start of each sequence's answer, or its end if it has none.
    """

    states: dict[int, Tensor]
    top_NK: Tensor
    logprobs_NK: Tensor
    ids_N: Tensor
    ends: tuple[int, ...]
    answers: tuple[int, ...]

    @classmethod
    def concatenate(cls, parts: Sequence[TeacherOutputs]) -> TeacherOutputs:
        """The sequences of all parts."""
        offsets = [0, *itertools.accumulate(part.ends[-1] for part in parts)][:-1]
        return cls(
            {depth: torch.cat([part.states[depth] for part in parts]) for depth in parts[0].states},
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
        """Number of tokens of each sequence."""
        return [end - start for start, end in map(self.bounds, range(len(self)))]

    @property
    def later_N(self) -> Tensor:
        """For each position (N,) whether it is not the first of its sequence."""
        later_N = torch.ones(self.ends[-1], dtype=torch.bool)
        later_N[[0, *self.ends[:-1]]] = False
        return later_N

    def has_answer(self, sequence: int) -> bool:
        """Whether the sequence has an answer of at least two tokens."""
        return self.answers[sequence] < self.bounds(sequence)[1] - 1

    def select(self, sequence: int) -> TeacherOutputs:
        """The outputs for one sequence."""
        start, end = self.bounds(sequence)
        return TeacherOutputs(
            {depth: states_NH[start:end] for depth, states_NH in self.states.items()},
            self.top_NK[start:end],
            self.logprobs_NK[start:end],
            self.ids_N[start:end],
            (end - start,),
            (self.answers[sequence] - start,),
        )

    def bounds(self, sequence: int) -> tuple[int, int]:
        """First position of a sequence, and the position after its last."""
        return (self.ends[sequence - 1] if sequence else 0), self.ends[sequence]


@torch.inference_mode()
def run_teacher(
    model: Llama, corpus: Corpus, depths: Sequence[int], dtype: torch.dtype = torch.bfloat16
) -> TeacherOutputs:
    """Run the model on a corpus. `depths`: from 0, the embedding, to all layers; `dtype`: of hidden states."""
    ends = corpus.ends_S.tolist()
    starts = [0, *ends[:-1]]
    total, hidden = len(corpus.ids_N), model.config.hidden
    states = {depth: torch.empty(total, hidden, dtype=dtype) for depth in depths}
    top_NK = torch.empty(total, TEACHER_TOKENS, dtype=torch.int32)
    logprobs_NK = torch.empty(total, TEACHER_TOKENS)
    ids_N = torch.from_numpy(corpus.ids_N.astype("int64"))
    lengths = [end - start for start, end in zip(starts, ends, strict=True)]
    for batch in track(list(length_batches(sorted(range(len(ends)), key=lengths.__getitem__), lengths)), "full model"):
        ids_BT = nn.utils.rnn.pad_sequence([ids_N[starts[s] : ends[s]] for s in batch], batch_first=True)
        x_by_depth = outputs_by_depth(model, ids_BT)
        for row, s in enumerate(batch):
            here, length = slice(starts[s], ends[s]), lengths[s]
            for depth in depths:
                states[depth][here] = x_by_depth[depth][row, :length]
            logprobs_TV = model.logits(x_by_depth[-1][row, :length]).float().log_softmax(-1)
            logprobs_NK[here], top_NK[here] = logprobs_TV.topk(TEACHER_TOKENS)
    return TeacherOutputs(states, top_NK, logprobs_NK, ids_N, tuple(ends), tuple(corpus.answers_S.tolist()))


def outputs_by_depth(model: Llama, ids_BT: Tensor) -> list[Tensor]:
    """Hidden states (B, T, H) at every depth, from the embedding to the last layer."""
    outputs = [model.embed(ids_BT)]
    for layer in model.layers:
        outputs.append(layer(outputs[-1])[0])
    return outputs


def random_batches(
    outputs: TeacherOutputs, chosen: Sequence[int], generator: torch.Generator, tokens: int = BATCH_TOKENS
) -> Iterator[list[int]]:
    """All chosen sequences once, in random order, in batches of similar length."""
    lengths = outputs.lengths
    jitter = (1 + 0.2 * torch.rand(len(outputs), generator=generator)).tolist()
    groups = list(length_batches(sorted(chosen, key=lambda s: lengths[s] * jitter[s]), lengths, tokens))
    for index in torch.randperm(len(groups), generator=generator).tolist():
        yield groups[index]


def length_batches(order: Sequence[int], lengths: Sequence[int], tokens: int = BATCH_TOKENS) -> Iterator[list[int]]:
    """Group sequences in this order into batches of at most `tokens` with padding, or of one sequence."""
    batch: list[int] = []
    for sequence in order:
        longest = max(lengths[other] for other in [*batch, sequence])
        if batch and longest * (len(batch) + 1) > tokens:
            yield batch
            batch = []
        batch.append(sequence)
    if batch:
        yield batch
