"""What crosses: the basis and tables of hidden states.

Transform coding of a layer's rows by their principal components, with integer tables, is ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.codecs.contextual import to_tensors
from models.language.states import components, sizes
from models.recipes.fit_tables import fit

Floats = NDArray[np.float32]
RATE_BYTES = (75, 110, 155, 205, 245, 305)  # of a row, for each rate; 576 values in 16 bits have 1,152
SIZE_GAIN = 12.0  # integers an octave of a row's size: within 3 %, over ten octaves to either side
LARGEST = 120.0  # integer, of 127, that a component of the rows at hand takes
BISECTIONS = 14
GAUGED_ROWS = 2000  # that gains are chosen on


def fit_states(rows_NH: Floats, rate_bytes: Sequence[float] = RATE_BYTES) -> dict[str, NDArray[Any]]:
    """The tensors of `states.safetensors`, from rows (N, hidden), for rates of about so many bytes a row."""
    sizes_N1 = sizes(rows_NH)
    shapes_NH = rows_NH / sizes_N1
    mean_H = shapes_NH.mean(0)
    centred_NH = (shapes_NH - mean_H).astype(np.float64)
    _, vectors_HC = np.linalg.eigh(centred_NH.T @ centred_NH)
    basis_CH = np.ascontiguousarray(vectors_HC[:, ::-1].T).astype(np.float16)
    middle_H1 = np.append(mean_H, np.log2(sizes_N1).mean()).astype(np.float16)
    latents_NC = components(rows_NH, basis_CH.astype(np.float32), middle_H1.astype(np.float32))
    gain_R1 = np.array([[gain_for(latents_NC, size)] for size in rate_bytes], np.float32)
    most_C = np.abs(latents_NC).max(0) + 1e-6  # no row is cut off: later tokens attend to the largest of all
    gain_RC = np.minimum(gain_R1, LARGEST / most_C).astype(np.float32)
    gain_RC[:, -1] = SIZE_GAIN
    integers = [np.rint(latents_NC * gain_C).astype(np.int32)[:, :, None, None] for gain_C in gain_RC]
    return {"basis": basis_CH, "middle": middle_H1, **to_tensors(fit(integers, gain_RC))}


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
