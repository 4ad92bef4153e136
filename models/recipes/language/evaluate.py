"""What a hand-off bundle is worth, on the full model's own greedy answers to prompts that nothing was trained on.

All figures are of positions in answers, with the full model's text before them: agreement with what it chose there.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import track
from torch import Tensor, nn

from isthmus.models.errors import InvalidInput
from isthmus.models.language.checkpoint.tokenizer import Message, Tokenizer
from isthmus.models.language.handoff.hidden_states import StateCodec
from isthmus.models.language.packing import unpacked
from isthmus.models.language.torch.kv_fill import EXACT_LAST, normalised
from isthmus.models.recipes.language.exits import Traces, grouped
from isthmus.models.recipes.language.llama import Layer, Llama
from isthmus.models.recipes.language.text import Texts, generate

ANSWER_TOKENS = 96
LONGEST_PROMPT = 512  # tokens; longer ones are left out
PROMPTS_AT_ONCE = 32


def chats(prompts: Path, tokenizer: Tokenizer, every: int = 1) -> list[list[int]]:
    """The prompts of a file as Spec-Bench's (JSON lines with "turns") as token ids, `every` so manyth by length.

    Raises InvalidInput when the file holds none.
    """
    try:
        lines = [json.loads(line)["turns"][0] for line in prompts.read_text(encoding="utf-8").splitlines() if line]
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise InvalidInput(f"{prompts}: expected lines of JSON with turns: {error!r}") from error
    found = sorted((tokenizer.chat([Message("user", str(line))]) for line in lines), key=len)
    found = [chat for chat in found if len(chat) <= LONGEST_PROMPT][::every]
    if not found:
        raise InvalidInput(f"{prompts} holds no prompt of at most {LONGEST_PROMPT} tokens")
    return found


def answered(folder: Path, model: Llama, eos_ids: frozenset[int], asked: Sequence[Sequence[int]]) -> tuple[str, Texts]:
    """The model's greedy answers to chats, kept below `folder`, and the name that they are kept under."""
    name = f"answers-{zlib.crc32(json.dumps(asked).encode()):08x}"
    path = folder / f"{name}.npz"
    if path.exists():
        return name, Texts.load(path)
    made, generator = [], torch.Generator().manual_seed(0)
    for start in track(range(0, len(asked), PROMPTS_AT_ONCE), "answers to test prompts"):
        batch = asked[start : start + PROMPTS_AT_ONCE]
        answers = generate(model, batch, ANSWER_TOKENS, eos_ids, generator, [0.0] * len(batch))
        made += [([*chat, *answer], len(chat)) for chat, answer in zip(batch, answers, strict=True)]
    texts = Texts.of(made)
    texts.save(path)
    return name, texts


@dataclass(frozen=True)
class Fill:
    """Maps (layers, outputs, hidden) with biases; keys and values of which earlier positions come from them.

    All but the first, as if no other token had been completed; `prompts_only`: but the last EXACT_LAST of a prompt too.
    """

    weight_LOH: Tensor
    bias_LO: Tensor
    prompts_only: bool = False

    @classmethod
    def of(cls, tensors: Mapping[str, NDArray[Any]]) -> Fill:
        """Of the tensors of `fill.safetensors`."""
        bias_LO = torch.from_numpy(tensors["bias"]).float()
        return cls(torch.from_numpy(unpacked(tensors, "weight")).view(*bias_LO.shape, -1), bias_LO)


class Crossing:
    """Rows of texts as they come to the cloud, all but the first of each text coded; at each rate once it is wanted."""

    def __init__(self, model: Llama, traces: Traces, depth: int, codec: StateCodec) -> None:
        self._traces, self._depth, self._codec = traces, depth, codec
        self._embedded_NH = model.embed(traces.ids_N)
        self._coded: dict[int, tuple[Tensor, NDArray[np.int64]]] = {}

    def coded(self, rate: int) -> tuple[Tensor, NDArray[np.int64]]:
        """Rows (N, hidden) at a rate, and bytes (N,) of each."""
        if rate not in self._coded:
            rows_NH = self._traces.rows[self._depth].float()
            coded_NH, sizes_N = rows_NH.clone(), np.zeros(len(rows_NH), np.int64)
            for start, end in map(self._traces.bounds, range(len(self._traces))):
                embedded_MH = self._embedded_NH[start:end].numpy()
                payloads = self._codec.encode(rows_NH[start + 1 : end].numpy(), embedded_MH, rate)
                coded_NH[start + 1 : end] = torch.from_numpy(self._codec.decode(payloads, embedded_MH, rate))
                sizes_N[start + 1 : end] = [len(payload) for payload in payloads]
            self._coded[rate] = coded_NH, sizes_N
        return self._coded[rate]

    def at(self, context_rate: int, rate: int, asked_N: Tensor) -> tuple[Traces, float]:
        """Rows that decide what is asked for at one rate, others at another; and bytes of a row on average."""
        (context_NH, context_sizes_N), (asked_NH, sizes_N) = self.coded(context_rate), self.coded(rate)
        rows_NH = torch.where(asked_N[:, None], asked_NH, context_NH)
        mean_bytes = float(np.where(asked_N.numpy(), sizes_N, context_sizes_N).mean())
        return replace(self._traces, rows={self._depth: rows_NH}), mean_bytes


@dataclass(frozen=True)
class Completed:
    """For each position (N,) the token that was chosen, and the log-probability of the one that follows in the text."""

    chosen_N: Tensor
    next_N: Tensor


@torch.inference_mode()
def completed(model: Llama, traces: Traces, depth: int, fill: Fill | None = None) -> Completed:
    """What the layers behind `depth` choose at every position, from the rows of `traces`."""
    found = Completed(torch.zeros(traces.ends[-1], dtype=torch.int64), torch.zeros(traces.ends[-1]))
    lengths = traces.lengths
    for group in track(list(grouped(sorted(range(len(traces)), key=lengths.__getitem__), lengths)), "completing"):
        spans = [traces.bounds(s) for s in group]
        parts = [traces.rows[depth][start:end].float() for start, end in spans]
        x_BTH = nn.utils.rnn.pad_sequence(parts, batch_first=True)
        given = None if fill is None else filled(x_BTH, fill)
        until_B = torch.tensor([traces.answers[s] - EXACT_LAST - traces.bounds(s)[0] for s in group])
        if fill is None or not fill.prompts_only:
            until_B = torch.full_like(until_B, x_BTH.shape[1])
        for index in range(depth, model.config.layers):
            x_BTH = behind(model.layers[index], x_BTH, None if given is None else given[index - depth], until_B)
        for row, (start, end) in enumerate(spans):
            logits_TV = model.logits(x_BTH[row, : end - start])
            found.chosen_N[start:end] = logits_TV.argmax(-1)
            found.next_N[start:end] = next_logprobs(logits_TV.float(), traces.ids_N[start:end])
    return found


def next_logprobs(logits_TV: Tensor, ids_T: Tensor) -> Tensor:
    """Log-probability (T,) of the token that follows each; 0 for the last."""
    own_T = logits_TV[:-1].gather(1, ids_T[1:, None])[:, 0] - logits_TV[:-1].logsumexp(1)
    return torch.cat([own_T, torch.zeros(1)])


def filled(x_BTH: Tensor, fill: Fill) -> list[Tensor]:
    """Keys, not rotated, and values (B, T, O) of each layer behind the rows."""
    shape_BTH = normalised(x_BTH.float())
    return [shape_BTH @ weight_OH.T + bias_O for weight_OH, bias_O in zip(fill.weight_LOH, fill.bias_LO, strict=True)]


def behind(layer: Layer, x_BTH: Tensor, given_BTO: Tensor | None, until_B: Tensor) -> Tensor:
    """Rows behind a layer. Each position reads the keys and values given of those before it and before `until_B`.

    Of the first position it reads the layer's own.
    """
    if given_BTO is None:
        out_BTH: Tensor = layer(x_BTH)[0]
        return out_BTH
    tokens = x_BTH.shape[1]
    places_BT = torch.arange(tokens).expand(x_BTH.shape[:2])
    q_BTHD, k_BTKD, v_BTKD = layer.project(x_BTH, places_BT)
    given_k, given_v = layer.given(given_BTO, places_BT)
    before_TT, self_TT = torch.ones(tokens, tokens, dtype=torch.bool).tril(-1), torch.eye(tokens, dtype=torch.bool)
    given_B1T = (torch.arange(tokens) > 0) & (torch.arange(tokens) < until_B[:, None, None])
    seen_B1TS = torch.cat([before_TT & given_B1T, before_TT & ~given_B1T | self_TT], 2)[:, None]
    keys_BKSD, values_BKSD = (torch.cat(pair, 1).transpose(1, 2) for pair in ((given_k, k_BTKD), (given_v, v_BTKD)))
    return layer.attend(x_BTH, q_BTHD, keys_BKSD, values_BKSD, seen_B1TS)
