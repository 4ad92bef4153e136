"""What crosses and what is filled in: the basis and tables of hidden states, and keys and values straight from them.

Sources: transform coding of a layer's rows by their principal components with integer tables is ours; the ridge maps
are KV Prediction (Horton et al., 2024) in closed form, from the model's own rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.codecs.contextual import to_tensors
from models.language.packing import packed
from models.language.states import components
from models.recipes.fit_tables import fit
from models.recipes.language_exits import Traces, ridge
from models.recipes.llama import Layer, Llama

Floats = NDArray[np.float32]
GAINS = (0.7, 1.0, 1.4, 2.0, 2.8, 4.0)  # integers a unit of a row divided by its root mean square, for each rate
SIZE_GAIN = 12.0  # integers an octave of a row's size: within 3 %, over ten octaves to either side


def fit_states(rows_NH: Floats, gains: Sequence[float] = GAINS) -> dict[str, NDArray[Any]]:
    """The tensors of `states.safetensors`, from rows (N, hidden)."""
    sizes_N1 = np.sqrt(np.mean(np.square(rows_NH, dtype=np.float64), axis=1, keepdims=True)) + 1e-6
    shapes_NH = rows_NH / sizes_N1
    mean_H = shapes_NH.mean(0)
    centred_NH = (shapes_NH - mean_H).astype(np.float64)
    _, vectors_HC = np.linalg.eigh(centred_NH.T @ centred_NH)
    basis_CH = np.ascontiguousarray(vectors_HC[:, ::-1].T).astype(np.float16)
    middle_H1 = np.append(mean_H, np.log2(sizes_N1).mean()).astype(np.float16)
    latents_NC = components(rows_NH, basis_CH.astype(np.float32), middle_H1.astype(np.float32))
    gain_RC = np.repeat(np.array(gains, np.float32)[:, None], latents_NC.shape[1], axis=1)
    gain_RC[:, -1] = SIZE_GAIN
    integers = [np.rint(latents_NC * gain_C).astype(np.int32)[:, :, None, None] for gain_C in gain_RC]
    return {"basis": basis_CH, "middle": middle_H1, **to_tensors(fit(integers, gain_RC))}


def fit_fill(model: Llama, traces: Traces, depth: int) -> dict[str, NDArray[Any]]:
    """The tensors of `fill.safetensors`; `traces` has the rows of every depth from `depth` to the last layer's own."""
    x_NH = normalised(traces.rows[depth].float())
    weights, biases = [], []
    for index in range(depth, model.config.layers):
        weight_OH, bias_O = ridge(x_NH, keys_values(model.layers[index], traces.rows[index]), 1e-3)
        weights.append(weight_OH.numpy())
        biases.append(bias_O.to(torch.float16).numpy())
    return {**packed(np.concatenate(weights), "weight"), "bias": np.stack(biases)}


def normalised(rows: Tensor) -> Tensor:
    """Rows divided by their root mean square, as `models.language.states` does."""
    return rows / (rows.square().mean(-1, keepdim=True).sqrt() + 1e-6)


def keys_values(layer: Layer, rows: Tensor) -> Tensor:
    """Keys, not rotated, then values (.., 2 * kv_heads * head_dim) that a layer makes of its rows."""
    h = layer.norm(rows.to(layer.weight("input_layernorm").dtype), "input_layernorm")
    parts = [h @ layer.weight(f"self_attn.{part}_proj").T for part in ("k", "v")]
    return torch.cat(parts, -1).float()
