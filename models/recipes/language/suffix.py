"""Run the upper layers on hidden states as the cloud does: coded at several rates, with exact or approximate KV.

    hidden states --StateCodec--> coded states --upper layers, KV fill--> choice at each position

All results are for positions of texts, each with the full model's own text before it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import track
from torch import Tensor, nn

from isthmus.models.language.handoff.hidden_states import StateCodec
from isthmus.models.language.packing import unpacked
from isthmus.models.language.torch.kv_fill import EXACT_LAST, normalised
from isthmus.models.recipes.language.llama import Layer, Llama
from isthmus.models.recipes.language.teacher import TeacherOutputs, length_batches


@dataclass(frozen=True)
class ApproximateKV:
    """The maps of a KV fill (layers, outputs, hidden) with biases, and for which positions they are used.

    For all positions but the first, as seen from later ones. With `prompts_only`, for those of prompts only, except
    their last EXACT_LAST.
    """

    weight_LOH: Tensor
    bias_LO: Tensor
    prompts_only: bool = False

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, NDArray[Any]]) -> ApproximateKV:
        """From the tensors of `fill.safetensors`."""
        bias_LO = torch.from_numpy(tensors["bias"]).float()
        return cls(torch.from_numpy(unpacked(tensors, "weight")).view(*bias_LO.shape, -1), bias_LO)


class CodedStates:
    """Hidden states of texts as the cloud receives them. All but the first of each text are coded, once a rate."""

    def __init__(self, model: Llama, teacher: TeacherOutputs, depth: int, codec: StateCodec) -> None:
        self.depth = depth
        self._teacher, self._codec = teacher, codec
        self._embedded_NH = model.embed(teacher.ids_N)
        self._at_rate: dict[int, tuple[Tensor, NDArray[np.int64]]] = {}

    def at_rate(self, rate: int) -> tuple[Tensor, NDArray[np.int64]]:
        """Decoded hidden states (N, hidden) at a rate, and the bytes (N,) of each."""
        if rate not in self._at_rate:
            states_NH = self._teacher.states[self.depth].float()
            decoded_NH, bytes_N = states_NH.clone(), np.zeros(len(states_NH), np.int64)
            for start, end in map(self._teacher.bounds, range(len(self._teacher))):
                embedded_MH = self._embedded_NH[start:end].numpy()
                payloads = self._codec.encode(states_NH[start + 1 : end].numpy(), embedded_MH, rate)
                decoded_NH[start + 1 : end] = torch.from_numpy(self._codec.decode(payloads, embedded_MH, rate))
                bytes_N[start + 1 : end] = [len(payload) for payload in payloads]
            self._at_rate[rate] = decoded_NH, bytes_N
        return self._at_rate[rate]

    def at_rates(self, context_rate: int, rate: int, offloaded_N: Tensor) -> tuple[TeacherOutputs, float]:
        """Hidden states of offloaded tokens at `rate` and all others at `context_rate`, and the mean bytes of one."""
        (context_NH, context_bytes_N), (states_NH, bytes_N) = self.at_rate(context_rate), self.at_rate(rate)
        mixed_NH = torch.where(offloaded_N[:, None], states_NH, context_NH)
        mean_bytes = float(np.where(offloaded_N.numpy(), bytes_N, context_bytes_N).mean())
        return replace(self._teacher, states={self.depth: mixed_NH}), mean_bytes


@dataclass(frozen=True)
class SuffixOutputs:
    """For each position (N,) the chosen token, and the log-probability of the one that follows in the text."""

    chosen_N: Tensor
    next_N: Tensor


@torch.inference_mode()
def run_suffix(
    model: Llama, teacher: TeacherOutputs, depth: int, approximate: ApproximateKV | None = None
) -> SuffixOutputs:
    """Run the layers after `depth` on the hidden states of `teacher`, for all positions."""
    outputs = SuffixOutputs(torch.zeros(teacher.ends[-1], dtype=torch.int64), torch.zeros(teacher.ends[-1]))
    lengths = teacher.lengths
    order = sorted(range(len(teacher)), key=lengths.__getitem__)
    for batch in track(list(length_batches(order, lengths)), "upper layers"):
        spans = [teacher.bounds(s) for s in batch]
        parts = [teacher.states[depth][start:end].float() for start, end in spans]
        x_BTH = nn.utils.rnn.pad_sequence(parts, batch_first=True)
        until_B = torch.tensor([teacher.answers[s] - EXACT_LAST - teacher.bounds(s)[0] for s in batch])
        x_BTH = run_upper_layers(list(model.layers)[depth:], x_BTH, until_B, approximate)
        for row, (start, end) in enumerate(spans):
            logits_TV = model.logits(x_BTH[row, : end - start])
            outputs.chosen_N[start:end] = logits_TV.argmax(-1)
            outputs.next_N[start:end] = next_logprobs(logits_TV.float(), teacher.ids_N[start:end])
    return outputs


def run_upper_layers(
    layers: Sequence[Layer], x_BTH: Tensor, until_B: Tensor, approximate: ApproximateKV | None
) -> Tensor:
    """Output (B, T, H) of the last layer. `until_B`: where approximate KV ends with `prompts_only`."""
    if approximate is None:
        for layer in layers:
            x_BTH = layer(x_BTH)[0]
        return x_BTH
    if not approximate.prompts_only:
        until_B = torch.full_like(until_B, x_BTH.shape[1])
    for layer, pairs_BTO in zip(layers, approximate_pairs(x_BTH, approximate), strict=True):
        x_BTH = run_layer(layer, x_BTH, pairs_BTO, until_B)
    return x_BTH


def next_logprobs(logits_TV: Tensor, ids_T: Tensor) -> Tensor:
    """Log-probability (T,) of the token that follows each position; 0 for the last."""
    own_T = logits_TV[:-1].gather(1, ids_T[1:, None])[:, 0] - logits_TV[:-1].logsumexp(1)
    return torch.cat([own_T, torch.zeros(1)])


def approximate_pairs(x_BTH: Tensor, approximate: ApproximateKV) -> list[Tensor]:
    """Approximate keys, before rotation, and values (B, T, O) for each upper layer."""
    normed_BTH, maps = normalised(x_BTH.float()), zip(approximate.weight_LOH, approximate.bias_LO, strict=True)
    return [normed_BTH @ weight_OH.T + bias_O for weight_OH, bias_O in maps]


def run_layer(layer: Layer, x_BTH: Tensor, pairs_BTO: Tensor, until_B: Tensor) -> Tensor:
    """Run a layer in which each position attends to the approximate KV of earlier positions before `until_B`.

    For itself, the first position and those from `until_B` on it attends to the layer's own keys and values.
    """
    tokens = x_BTH.shape[1]
    positions_BT = torch.arange(tokens).expand(x_BTH.shape[:2])
    q_BTHD, k_BTKD, v_BTKD = layer.project(x_BTH, positions_BT)
    approximate_k, approximate_v = layer.rotated_pairs(pairs_BTO, positions_BT)
    before_TT, self_TT = torch.ones(tokens, tokens, dtype=torch.bool).tril(-1), torch.eye(tokens, dtype=torch.bool)
    approximate_B1T = (torch.arange(tokens) > 0) & (torch.arange(tokens) < until_B[:, None, None])
    mask_B1TS = torch.cat([before_TT & approximate_B1T, before_TT & ~approximate_B1T | self_TT], 2)[:, None]
    keys_BKSD, values_BKSD = (
        torch.cat(pair, 1).transpose(1, 2) for pair in ((approximate_k, k_BTKD), (approximate_v, v_BTKD))
    )
    return layer.attend(x_BTH, q_BTHD, keys_BKSD, values_BKSD, mask_B1TS)
