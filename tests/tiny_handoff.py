"""A handoff bundle for a tiny language model: a random transform, one table a rate, a KV fill by least squares.

`recipes.common.fit_tables` would take minutes for this many channels, and saves no bytes on isotropic hidden states.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from isthmus.models.bundle.files import write_bundle
from isthmus.models.codecs import checkerboard as contextual
from isthmus.models.codecs.context_model import ALL_CONTEXTS, ENDS, PHASES
from isthmus.models.language.checkpoint.checkpoint import Checkpoint
from isthmus.models.language.handoff.confidence_head import FEATURES
from isthmus.models.language.handoff.hidden_states import PREDICTOR_TOKENS, StateCodec, Transform, predictor_inputs
from isthmus.models.language.handoff.manifest import HandoffManifest
from isthmus.models.language.packing import Floats, packed, unpacked
from isthmus.models.language.torch.batch_invariance import chunks
from isthmus.models.language.torch.decoder import Decoder, Span, rotate
from isthmus.models.recipes.common.fit_bank import MAX_INTEGER, frequencies
from isthmus.models.recipes.language.device_outputs import exit_tensors
from isthmus.models.recipes.language.exits import Exit
from isthmus.models.recipes.language.llama import Llama

GAINS = ((3.0, 8.0), (24.0, 16.0))  # of a component and of the rms, for a coarse rate and a fine one
PREDICTED = 0.03  # scale of the predictor's weights
MAX_STATE_BYTES = 160  # 65 channels of at most 16 bits, and a margin
TEXTS = 3
LOWEST, STEEP = 30.0, 4.0  # of a confidence head: minus the lowest log-probability, and the slope at its threshold


def write_tiny_handoff(folder: Path, checkpoint: Checkpoint, *, depth: int = 1, seed: int = 0) -> Path:
    """A bundle whose device runs `depth` layers, with an exit after each that equals the model's last layer."""
    states_NH, embedded_NH, targets_NLO = random_texts(checkpoint, depth, seed)
    states = state_tensors(states_NH, embedded_NH, seed)
    codec = StateCodec(states, checkpoint.config.hidden, len(GAINS), MAX_STATE_BYTES)
    exits = {f"exit{index}.safetensors": exit_of(checkpoint, index, seed) for index in range(1, depth + 1)}
    files = {
        **{name: safetensors.numpy.save(tensors) for name, tensors in exits.items()},
        "states.safetensors": safetensors.numpy.save(states),
        "fill.safetensors": safetensors.numpy.save(fill_tensors(states_NH, targets_NLO)),
    }
    threshold = {"confidence": 0.5, "coverage": 0.5, "agreement": 0.9}
    manifest: dict[str, Any] = {
        "kind": "handoff",
        "name": "tiny-handoff",
        "licence": "Apache-2.0",
        "base": checkpoint.fingerprint.hex(),
        "hidden": checkpoint.config.hidden,
        "depth": depth,
        "exits": [
            {"depth": index, "weights": f"exit{index}.safetensors", "agreement": 0.5} for index in range(1, depth + 1)
        ],
        "thresholds": [threshold],
        "states": "states.safetensors",
        "rates": [rate_entry(codec, states_NH, embedded_NH, rate) for rate in codec.rates],
        "points": [
            {"context_rate": 0, "rate": 0, "mean_bytes": 30.0, "agreement": 0.5},
            {"context_rate": 0, "rate": 1, "mean_bytes": 50.0, "agreement": 0.5},
        ],
        "max_state_bytes": MAX_STATE_BYTES,
        "fill": "fill.safetensors",
        "training": {
            "command": "none",
            "seed": seed,
            "seconds": 1.0,
            "machine": "none",
            "data": "random tokens",
            "versions": {"numpy": np.__version__},
        },
        "scores": {},
    }
    return write_bundle(folder, manifest, files, HandoffManifest)


def exit_of(checkpoint: Checkpoint, depth: int, seed: int) -> dict[str, NDArray[Any]]:
    """The last layer after an identity map, and a confidence head that is confident of half of the tokens."""
    exit_, model = Exit(checkpoint.config, depth, 1), Llama.load(checkpoint, torch.float32)
    with torch.no_grad():
        exit_.map.weight.copy_(torch.eye(checkpoint.config.hidden))
        exit_.map.bias.zero_()
        exit_.layers[0].load_state_dict(model.layers[-1].state_dict())
        x_BTH, _ = early_logits(checkpoint, depth, seed)
        logits_BTV = F.linear(exit_(x_BTH), model.embedding_VH)
    return {**exit_tensors(exit_, checkpoint), **head_tensors(logits_BTV)}


@torch.no_grad()
def early_logits(checkpoint: Checkpoint, depth: int, seed: int) -> tuple[Tensor, Tensor]:
    """Hidden states of random texts at a depth, and the logits of the model's output head on them."""
    model = Llama.load(checkpoint, torch.float32)
    ids = torch.randint(3, checkpoint.config.vocab, (4, 50), generator=torch.Generator().manual_seed(seed))
    x_BTH = model.embed(ids)
    for layer in list(model.layers)[:depth]:
        x_BTH, _ = layer(x_BTH)
    return x_BTH, model.logits(x_BTH)


def head_tensors(logits_BTV: Tensor, offloaded: float = 0.5) -> dict[str, NDArray[Any]]:
    """A confidence head that is below 0.5 for the share `offloaded` of the tokens, the least likely ones."""
    threshold = float(logits_BTV.log_softmax(-1).amax(-1).quantile(offloaded))
    head = {
        "judge.0.weight": torch.tensor([[1.0, *[0.0] * (FEATURES - 1)]]),  # the log-probability of the choice
        "judge.0.bias": torch.tensor([LOWEST]),
        "judge.2.weight": torch.tensor([[STEEP]]),
        "judge.2.bias": torch.tensor([-STEEP * (threshold + LOWEST)]),
    }
    return {name: tensor.numpy() for name, tensor in head.items()}


def random_texts(checkpoint: Checkpoint, depth: int, seed: int) -> tuple[Floats, Floats, Floats]:
    """Hidden states (N, hidden) of random texts at `depth`, embeddings (N, hidden), KV of upper layers (N, L, O)."""
    decoder = Decoder.load(checkpoint, torch.float32)
    lower, upper = decoder[:depth], decoder[depth:]
    rng, states, embedded, targets = np.random.default_rng(seed), [], [], []
    for _ in range(TEXTS):
        cache, later = lower.new_cache(), upper.new_cache()
        ids = rng.integers(3, checkpoint.config.vocab, min(200, checkpoint.config.context)).tolist()
        for start, count in zip(range(0, len(ids), decoder.width), chunks(len(ids), decoder.width), strict=True):
            embedded_NH = lower.embed(ids[start : start + count])
            x_NH = lower.forward(embedded_NH, [Span(cache, start, count)])
            upper.forward(x_NH, [Span(later, start, count)])
            states.append(x_NH[:count].numpy())
            embedded.append(embedded_NH[:count].numpy())
        cos_N1D, sin_N1D = decoder.rotation(range(len(ids)))
        layers = []
        for layer in upper.layers:
            keys_NKD, values_NKD = (pair_KTD.transpose(0, 1) for pair_KTD in later.read(layer, len(ids)))
            keys_NKD = rotate(keys_NKD, cos_N1D, -sin_N1D)  # undo the rotation
            layers.append(torch.cat([keys_NKD.flatten(1), values_NKD.flatten(1)], dim=1).numpy())
        targets.append(np.stack(layers, axis=1))
    return np.concatenate(states), np.concatenate(embedded), np.concatenate(targets)


def state_tensors(states_NH: Floats, embedded_NH: Floats, seed: int) -> dict[str, NDArray[Any]]:
    hidden, rng = states_NH.shape[1], np.random.default_rng(seed)
    matrix_CH = np.linalg.qr(rng.normal(size=(hidden, hidden)))[0].astype(np.float32)
    predictor_CT = rng.normal(size=(hidden, PREDICTOR_TOKENS * hidden)).astype(np.float32) * np.float32(PREDICTED)
    rms_N1 = np.sqrt(np.mean(np.square(states_NH), axis=1, keepdims=True))
    middle_H1 = np.append((states_NH / rms_N1).mean(0), np.log2(rms_N1).mean()).astype(np.float32)
    stored = {**packed(matrix_CH, "transform", 8), **packed(predictor_CT, "predictor", 8), "middle": middle_H1}
    transform = Transform.of(unpacked(stored, "transform"), middle_H1, unpacked(stored, "predictor"))
    latents_NC11 = transform.latents(states_NH[1:], predictor_inputs(embedded_NH[:-1], embedded_NH[1:]))[
        :, :, None, None
    ]
    gain_RC = np.array([[shape] * hidden + [size] for shape, size in GAINS], np.float32)
    integers = [np.rint(latents_NC11 * gain_C[:, None, None]).astype(np.int32) for gain_C in gain_RC]
    return {**stored, **contextual.to_tensors(tables(integers, gain_RC))}


def tables(integers: Sequence[NDArray[np.int32]], gain_RC: Floats) -> contextual.Tables:
    """One table for each rate, for all channels in all contexts."""
    rates, channels = gain_RC.shape
    top_R = np.array([min(np.abs(of_rate).max() + 2, MAX_INTEGER) for of_rate in integers])
    bank = []
    for top, of_rate in zip(top_R.tolist(), integers, strict=True):
        counts = np.bincount((np.clip(of_rate, -top, top) + top).ravel(), minlength=2 * top + 1)
        bank.append(frequencies(counts.astype(np.float64) + 1))
    rows, rate_R1 = rates * channels, np.arange(rates)[:, None]
    return contextual.Tables(
        gain_RC=gain_RC,
        low_RC=np.broadcast_to(-top_R[:, None], (rates, channels)).astype(np.int8),
        high_RC=np.broadcast_to(top_R[:, None], (rates, channels)).astype(np.int8),
        near_L2=np.ones((rows, 2), np.uint8),
        slope_L=np.zeros(rows, np.int16),
        bias_L2=np.zeros((rows, PHASES), np.int16),
        ends_L24=np.zeros((rows, PHASES, ENDS), np.int8),
        prior_LK=np.repeat(rate_R1, channels, axis=0).repeat(ALL_CONTEXTS, axis=1).astype(np.uint8),
        table_E=np.arange(rates, dtype=np.uint8),
        first_E=-top_R.astype(np.int16),
        lengths_T=np.array([len(table) for table in bank], np.uint16),
        frequencies=np.concatenate(bank).astype(np.uint16),
    )


def fill_tensors(states_NH: Floats, targets_NLO: Floats) -> dict[str, NDArray[Any]]:
    count, layers, outputs = targets_NLO.shape
    rms_N1 = np.sqrt(np.mean(np.square(states_NH), axis=1, keepdims=True)) + 1e-6
    inputs = np.concatenate([states_NH / rms_N1, np.ones((count, 1), np.float32)], axis=1)
    found = np.linalg.lstsq(inputs, targets_NLO.reshape(count, -1), rcond=None)[0].astype(np.float32)
    return {**packed(np.ascontiguousarray(found[:-1].T), "weight", 8), "bias": found[-1].reshape(layers, outputs)}


def rate_entry(codec: StateCodec, states_NH: Floats, embedded_NH: Floats, rate: int) -> dict[str, float]:
    sizes = [len(payload) for payload in codec.encode(states_NH[1:40], embedded_NH[:40], rate)]
    return {"mean_bytes": float(np.mean(sizes)), "max_bytes": max(sizes)}
