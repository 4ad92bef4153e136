"""What crosses: the transform, the predictor and the tables of hidden states.

    texts --the layers behind, backwards--> what an error in a row does to what is decided later
    rows, tokens --ridge--> predictor; what is left --as harmful each, uncorrelated--> transform --> tables

Two ways lead from a row to what is decided: through the keys and values that later tokens attend to, and, where a token
is asked for, from its own row upwards. Most rows only go the first way, and cross at low rates, where errors are large;
so the second counts less here than its share.

Transform coding of a layer's rows, weighted by the Fisher information of what is decided, is ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import track
from torch import Tensor

from isthmus.models.codecs.checkerboard import to_tensors
from isthmus.models.language.handoff.hidden_states import Transform, pairs, sizes
from isthmus.models.language.packing import packed, unpacked
from isthmus.models.recipes.common.fit_tables import fit
from isthmus.models.recipes.common.ridge import ridge
from isthmus.models.recipes.language.exits import Traces
from isthmus.models.recipes.language.llama import Layer, Llama

Floats = NDArray[np.float32]
RATE_BYTES = (60, 80, 100, 140, 190, 220, 260, 380)  # of a row, for each rate; 576 values in 16 bits have 1,152
OWN_WAY = 0.1  # what the way from a row upwards counts, beside that through keys and values
EVENLY = 0.05  # of the mean harm, added in every direction: none is free
RIDGE = 0.01  # of a row for each of the predictor's
TRANSFORM_BITS, PREDICTOR_BITS = 5, 4
SIZE_GAIN = 12.0  # integers an octave of a row's size: within 3 %, over ten octaves to either side
LARGEST = 120.0  # integer, of 127, that a component of the rows at hand takes
BISECTIONS = 14
GAUGED_ROWS = 2000  # that gains are chosen on


def fit_states(
    rows_NH: Floats, pairs_NT: Floats, harm_HH: Floats, rate_bytes: Sequence[float] = RATE_BYTES
) -> dict[str, NDArray[Any]]:
    """The tensors of `states.safetensors`, for rates of about so many bytes a row.

    Rows (N, hidden), `handoff.hidden_states.pairs` of their tokens, and what an error does to them as `harm` has it.
    """
    sizes_N1 = sizes(rows_NH)
    shapes_NH = (rows_NH / sizes_N1).astype(np.float32)
    gram_TT, moment_TH = pairs_NT.T @ pairs_NT, pairs_NT.T @ (shapes_NH - shapes_NH.mean(0))
    predictor_HT = np.ascontiguousarray(ridge(gram_TT, moment_TH, RIDGE * len(pairs_NT)).T.astype(np.float32))
    left_NH = shapes_NH - pairs_NT @ predictor_HT.T
    middle_H1 = np.append(left_NH.mean(0), np.log2(sizes_N1).mean()).astype(np.float16)
    matrix_CH = whitening(left_NH - left_NH.mean(0), harm_HH)
    stored = {
        **packed(matrix_CH, "transform", TRANSFORM_BITS),
        **packed(np.ascontiguousarray(matrix_CH @ predictor_HT), "predictor", PREDICTOR_BITS),
        "middle": middle_H1,
    }
    transform = Transform.of(unpacked(stored, "transform"), middle_H1.astype(np.float32), unpacked(stored, "predictor"))
    latents_NC = transform.latents(rows_NH, pairs_NT)
    gain_R1 = np.array([[gain_for(latents_NC, size)] for size in rate_bytes], np.float32)
    most_C = np.abs(latents_NC).max(0) + 1e-6  # no row is cut off: later tokens attend to the largest of all
    gain_RC = np.minimum(gain_R1, LARGEST / most_C).astype(np.float32)
    gain_RC[:, -1] = SIZE_GAIN
    integers = [np.rint(latents_NC * gain_C).astype(np.int32)[:, :, None, None] for gain_C in gain_RC]
    return {**stored, **to_tensors(fit(integers, gain_RC))}


def whitening(rows_NH: Floats, harm_HH: Floats) -> Floats:
    """Matrix (C, H): components of rows that are uncorrelated, and whose errors do the same harm each.

    Those that vary the most come first.
    """
    harm_H, directions_HH = np.linalg.eigh(harm_HH.astype(np.float64) * len(harm_HH) / np.trace(harm_HH))
    weighted_HH = (directions_HH * np.sqrt(np.maximum(harm_H, 0) + EVENLY)) @ directions_HH.T
    seen_NH = rows_NH @ weighted_HH
    _, vectors_HC = np.linalg.eigh(seen_NH.T @ seen_NH)
    return np.ascontiguousarray((weighted_HH @ vectors_HC[:, ::-1]).T.astype(np.float32))


def harm(model: Llama, traces: Traces, sequences: Sequence[int], depth: int, seed: int) -> Floats:
    """Matrix (H, H) of what an error of a row's shape behind `depth` layers does to the tokens decided in answers.

    Squared, in nats, about: Fisher information, by gradients of the log-probability of tokens that are drawn from what
    the model says. Ways as in the module's head.
    """
    generator, hidden = torch.Generator().manual_seed(seed), model.config.hidden
    found_HH = torch.zeros(hidden, hidden)
    for sequence in track(sequences, "harm of errors"):
        start, end = traces.bounds(sequence)
        decides = traces.answers[sequence] - 1 - start
        rows_1TH = traces.rows[depth][start:end].float()[None]
        read_1TH, own_1TH = rows_1TH.clone().requires_grad_(), rows_1TH.clone().requires_grad_()
        heard_1TH, last_1TH = read_1TH, own_1TH
        for layer in list(model.layers)[depth:]:
            heard_1TH, last_1TH = two_ways(layer, heard_1TH, last_1TH)
        logprobs_TV = model.logits(last_1TH[0, decides:]).float().log_softmax(-1)
        drawn_T1 = torch.multinomial(logprobs_TV.detach().exp(), 1, generator=generator)
        gradients = torch.autograd.grad(logprobs_TV.gather(1, drawn_T1).sum(), [read_1TH, own_1TH])
        size_T1 = torch.from_numpy(sizes(rows_1TH[0].numpy())).float()
        for weight, gradient_1TH in zip((1.0, OWN_WAY), gradients, strict=True):
            gradient_TH = gradient_1TH[0, 1:] * size_T1[1:]  # first tokens do not cross
            found_HH += weight * gradient_TH.T @ gradient_TH
    harm_HH: Floats = found_HH.numpy()
    return harm_HH


def two_ways(layer: Layer, heard_BTH: Tensor, own_BTH: Tensor) -> tuple[Tensor, Tensor]:
    """Rows behind a layer: those that others attend to, and those that attend to these, and each to itself alone."""
    tokens = heard_BTH.shape[1]
    places_BT = torch.arange(tokens).expand(heard_BTH.shape[:2])
    q_BTHD, k_BTKD, v_BTKD = layer.project(heard_BTH, places_BT)
    own_q, own_k, own_v = layer.project(own_BTH, places_BT)
    before_TT, self_TT = torch.ones(tokens, tokens, dtype=torch.bool).tril(-1), torch.eye(tokens, dtype=torch.bool)
    keys_BKSD, values_BKSD = (torch.cat(pair, 1).transpose(1, 2) for pair in ((k_BTKD, own_k), (v_BTKD, own_v)))
    heard_BTH = layer.attend(heard_BTH, q_BTHD, k_BTKD.transpose(1, 2), v_BTKD.transpose(1, 2), before_TT | self_TT)
    return heard_BTH, layer.attend(own_BTH, own_q, keys_BKSD, values_BKSD, torch.cat([before_TT, self_TT], 1))


def token_pairs(model: Llama, traces: Traces, places_N: Tensor) -> Floats:
    """`models.language.handoff.hidden_states.pairs` of the tokens at some places of traces, none of them a first."""
    before_NH, own_NH = (model.embed(traces.ids_N[places]).numpy() for places in (places_N - 1, places_N))
    return pairs(before_NH, own_NH)


def gain_for(latents_NC: Floats, size: float) -> float:
    """The gain at which rows take about `size` bytes, each channel coded by its own frequencies."""
    some_NC, low, high = latents_NC[:: len(latents_NC) // GAUGED_ROWS + 1, :-1], 1e-3, 1e3
    for _ in range(BISECTIONS):
        gain, bits = (low * high) ** 0.5, 0.0
        for values_N in np.rint(some_NC.T * gain).astype(np.int64):
            counts = np.unique(values_N, return_counts=True)[1]
            bits += float(np.log2(len(values_N)) - (counts * np.log2(counts)).sum() / len(values_N))
        low, high = (gain, high) if bits / 8 < size else (low, gain)
    return float((low * high) ** 0.5)
