"""Fit the codec of hidden states: predictor, transform and integer tables.

    answers --upper layers, backwards--> sensitivity of later tokens to an error in a hidden state
    hidden states, tokens --ridge--> predictor; residual --decorrelated, equally sensitive--> transform --> tables

An error reaches later predictions on two paths: through the keys and values that later tokens attend to, and, where a
token is decoded in the cloud, from its own hidden state upwards. Most hidden states are only attended to, and coded at
low rates with large errors; the second path is therefore weighted less than its share.

Transform coding of hidden states weighted by the Fisher information of later predictions is ours.
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
from isthmus.models.language.handoff.hidden_states import Transform, predictor_inputs, root_mean_square
from isthmus.models.language.packing import packed, unpacked
from isthmus.models.recipes.common.fit_tables import fit
from isthmus.models.recipes.common.ridge import ridge
from isthmus.models.recipes.language.llama import Layer, Llama
from isthmus.models.recipes.language.teacher import TeacherOutputs

Floats = NDArray[np.float32]
RATE_BYTES = (
    60,
    80,
    100,
    140,
    190,
    220,
    260,
    380,
)  # target size of a hidden state at each rate; 576 values in 16 bits take 1,152
OWN_PATH_WEIGHT = 0.1  # of the path upwards, relative to that through keys and values
UNIFORM_SHARE = 0.05  # of the mean sensitivity, added in every direction so that none is free
RIDGE = 0.01  # penalty of the predictor, for each hidden state
TRANSFORM_BITS, PREDICTOR_BITS = 5, 4
RMS_GAIN = 12.0  # integers an octave of the rms: within 3 %, over ten octaves in either direction
LARGEST = 120.0  # largest integer, of 127, for the hidden states at hand
BISECTIONS = 14
GAIN_STATES = 2000  # hidden states that gains are chosen on


def fit_states(
    states_NH: Floats, inputs_NT: Floats, sensitivity_HH: Floats, rate_bytes: Sequence[float] = RATE_BYTES
) -> dict[str, NDArray[Any]]:
    """The tensors of `states.safetensors`, with one rate for each target size in `rate_bytes`.

    Hidden states (N, hidden), `predictor_inputs` of their tokens, and a matrix of `sensitivity`.
    """
    rms_N1 = root_mean_square(states_NH)
    directions_NH = (states_NH / rms_N1).astype(np.float32)
    gram_TT, moment_TH = inputs_NT.T @ inputs_NT, inputs_NT.T @ (directions_NH - directions_NH.mean(0))
    weight_TH = ridge(gram_TT, moment_TH, RIDGE * len(inputs_NT))
    predictor_HT = np.ascontiguousarray(weight_TH.T.astype(np.float32))
    residual_NH = directions_NH - inputs_NT @ predictor_HT.T
    middle_H1 = np.append(residual_NH.mean(0), np.log2(rms_N1).mean()).astype(np.float16)
    matrix_CH = whitening(residual_NH - residual_NH.mean(0), sensitivity_HH)
    stored = {
        **packed(matrix_CH, "transform", TRANSFORM_BITS),
        **packed(np.ascontiguousarray(matrix_CH @ predictor_HT), "predictor", PREDICTOR_BITS),
        "middle": middle_H1,
    }
    transform = Transform.of(unpacked(stored, "transform"), middle_H1.astype(np.float32), unpacked(stored, "predictor"))
    return {**stored, **fit_rates(transform.latents(states_NH, inputs_NT), rate_bytes)}


def fit_rates(latents_NC: Floats, rate_bytes: Sequence[float]) -> dict[str, NDArray[Any]]:
    """Gains and integer tables for latents, as tensors."""
    gain_R1 = np.array([[gain_for(latents_NC, size)] for size in rate_bytes], np.float32)
    most_C = np.abs(latents_NC).max(0) + 1e-6  # no latent is clipped: later tokens attend to the largest hidden states
    gain_RC = np.minimum(gain_R1, LARGEST / most_C).astype(np.float32)
    gain_RC[:, -1] = RMS_GAIN
    integers = [np.rint(latents_NC * gain_C).astype(np.int32)[:, :, None, None] for gain_C in gain_RC]
    return to_tensors(fit(integers, gain_RC))


def whitening(states_NH: Floats, sensitivity_HH: Floats) -> Floats:
    """Matrix (C, H) to uncorrelated components that are equally sensitive to errors, by falling variance."""
    normed_HH = sensitivity_HH.astype(np.float64) * len(sensitivity_HH) / np.trace(sensitivity_HH)
    value_H, vectors_HH = np.linalg.eigh(normed_HH)
    root_HH = (vectors_HH * np.sqrt(np.maximum(value_H, 0) + UNIFORM_SHARE)) @ vectors_HH.T
    weighted_NH = states_NH @ root_HH
    _, vectors_HC = np.linalg.eigh(weighted_NH.T @ weighted_NH)
    return np.ascontiguousarray((root_HH @ vectors_HC[:, ::-1]).T.astype(np.float32))


def sensitivity(model: Llama, teacher: TeacherOutputs, sequences: Sequence[int], depth: int, seed: int) -> Floats:
    """Matrix (H, H): squared effect, in nats, of an error in a normalised hidden state at `depth` on tokens of answers.

    An estimate of the Fisher information, from gradients of the log-probability of tokens sampled from the model's own
    distribution, over both paths.
    """
    generator, hidden = torch.Generator().manual_seed(seed), model.config.hidden
    sum_HH = torch.zeros(hidden, hidden)
    for sequence in track(sequences, "sensitivity"):
        start, end = teacher.bounds(sequence)
        first = teacher.answers[sequence] - 1 - start
        states_1TH = teacher.states[depth][start:end].float()[None]
        attended_1TH, own_1TH = states_1TH.clone().requires_grad_(), states_1TH.clone().requires_grad_()
        lower_1TH, upper_1TH = attended_1TH, own_1TH
        for layer in list(model.layers)[depth:]:
            lower_1TH, upper_1TH = two_paths(layer, lower_1TH, upper_1TH)
        logprobs_TV = model.logits(upper_1TH[0, first:]).float().log_softmax(-1)
        sampled_T1 = torch.multinomial(logprobs_TV.detach().exp(), 1, generator=generator)
        gradients = torch.autograd.grad(logprobs_TV.gather(1, sampled_T1).sum(), [attended_1TH, own_1TH])
        rms_T1 = torch.from_numpy(root_mean_square(states_1TH[0].numpy())).float()
        for weight, gradient_1TH in zip((1.0, OWN_PATH_WEIGHT), gradients, strict=True):
            gradient_TH = gradient_1TH[0, 1:] * rms_T1[1:]  # first tokens are not sent
            sum_HH += weight * gradient_TH.T @ gradient_TH
    sensitivity_HH: Floats = sum_HH.numpy()
    return sensitivity_HH


def two_paths(layer: Layer, attended_BTH: Tensor, own_BTH: Tensor) -> tuple[Tensor, Tensor]:
    """A layer's output for two versions of the hidden states.

    `attended` attend to each other. Each of `own` attends to earlier ones of `attended`, and to itself.
    """
    tokens = attended_BTH.shape[1]
    positions_BT = torch.arange(tokens).expand(attended_BTH.shape[:2])
    q_BTHD, k_BTKD, v_BTKD = layer.project(attended_BTH, positions_BT)
    own_q, own_k, own_v = layer.project(own_BTH, positions_BT)
    before_TT, self_TT = torch.ones(tokens, tokens, dtype=torch.bool).tril(-1), torch.eye(tokens, dtype=torch.bool)
    keys_BKSD, values_BKSD = (torch.cat(pair, 1).transpose(1, 2) for pair in ((k_BTKD, own_k), (v_BTKD, own_v)))
    causal_TT = before_TT | self_TT
    attended_BTH = layer.attend(attended_BTH, q_BTHD, k_BTKD.transpose(1, 2), v_BTKD.transpose(1, 2), causal_TT)
    return attended_BTH, layer.attend(own_BTH, own_q, keys_BKSD, values_BKSD, torch.cat([before_TT, self_TT], 1))


def inputs_at(model: Llama, teacher: TeacherOutputs, positions_N: Tensor) -> Floats:
    """`predictor_inputs` of the tokens at some positions, none of which is the first of its sequence."""
    before_NH, own_NH = (model.embed(teacher.ids_N[at]).numpy() for at in (positions_N - 1, positions_N))
    return predictor_inputs(before_NH, own_NH)


def gain_for(latents_NC: Floats, size: float) -> float:
    """The gain at which a latent takes about `size` bytes, by the entropy of each channel, by bisection."""
    some_NC, low, high = latents_NC[:: len(latents_NC) // GAIN_STATES + 1, :-1], 1e-3, 1e3
    for _ in range(BISECTIONS):
        gain, bits = (low * high) ** 0.5, 0.0
        for values_N in np.rint(some_NC.T * gain).astype(np.int64):
            counts = np.unique(values_N, return_counts=True)[1]
            bits += float(np.log2(len(values_N)) - (counts * np.log2(counts)).sum() / len(values_N))
        low, high = (gain, high) if bits / 8 < size else (low, gain)
    return float((low * high) ** 0.5)
