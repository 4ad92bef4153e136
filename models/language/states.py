"""Hidden states of a language model as bytes: principal components -> integers -> rANS, and back, at several rates.

    row_H --/ its rms--> - mean --> basis --> (C, 1, 1) with the rms's logarithm as one channel more --codec--> bytes

Rows differ in size by orders of magnitude and mostly in a few directions, so a row is sent as a shape and a size. Steps
are equal for all components: what is small costs nothing. Integers and tables are portable; the floats are not.
Knows nothing about layers or sessions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.codecs.contextual import ContextualCodec, from_tensors
from models.errors import BundleError, InvalidInput

SIZE_SCALE = 8.0  # of the size channel, so that its steps are as fine as those of the others

Floats = NDArray[np.float32]


class StateCodec:
    """Codes rows (hidden,) one by one, so that any of them may be dropped or sent again."""

    def __init__(self, tensors: Mapping[str, NDArray[Any]], hidden: int, rates: int, max_bytes: int) -> None:
        """Raises BundleError when a tensor is missing or does not fit."""
        self._basis_CH, self._mean_H = (matrix(tensors, name, axes) for name, axes in (("basis", 2), ("middle", 1)))
        if self._basis_CH.shape[1:] != self._mean_H.shape or self._mean_H.shape != (hidden,):
            raise BundleError(f"the basis has shape {self._basis_CH.shape}, the model {hidden} hidden values")
        shape_CHW = (len(self._basis_CH) + 1, 1, 1)
        self._codec = ContextualCodec(from_tensors(tensors, rates), shape_CHW, max_bytes)
        self.rates = self._codec.rates

    def encode(self, rows_NH: Floats, rate: int) -> list[bytes]:
        """A payload for each row.

        Raises InvalidInput for rows that are not finite, PayloadTooLarge when a row does not fit into the cap.
        """
        return [self._codec.encode(self._codec.quantise(each[:, None, None], rate), rate) for each in self._to(rows_NH)]

    def decode(self, payloads: Sequence[bytes], rate: int) -> Floats:
        """The rows (N, hidden). Raises InvalidInput, PayloadTooLarge, PayloadCorrupt."""
        found = [self._codec.dequantise(self._codec.decode(payload, rate), rate)[:, 0, 0] for payload in payloads]
        return self._back(np.stack(found)) if found else np.zeros((0, len(self._mean_H)), np.float32)

    def _to(self, rows_NH: Floats) -> Floats:
        if not np.isfinite(rows_NH).all():
            raise InvalidInput("a hidden state holds values that are not finite")
        return components(rows_NH, self._basis_CH, self._mean_H)

    def _back(self, latents_NC: Floats) -> Floats:
        shape_NH = latents_NC[:, :-1] @ self._basis_CH + self._mean_H
        size_N1 = np.exp2(np.clip(latents_NC[:, -1:] / SIZE_SCALE, -30, 30))
        return np.asarray(shape_NH * size_N1, np.float32)


def components(rows_NH: Floats, basis_CH: Floats, mean_H: Floats) -> Floats:
    """Latents (N, C + 1) of rows: components of what is left of a row's own size, and its logarithm to base 2."""
    size_N1 = np.sqrt(np.mean(np.square(rows_NH), axis=1, keepdims=True)) + 1e-6
    latents_NC = (rows_NH / size_N1 - mean_H) @ basis_CH.T
    return np.asarray(np.concatenate([latents_NC, SIZE_SCALE * np.log2(size_N1)], axis=1), np.float32)


def matrix(tensors: Mapping[str, NDArray[Any]], name: str, axes: int) -> Floats:
    """A float tensor of a bundle. Raises BundleError."""
    array = tensors.get(name)
    if array is None or array.ndim != axes or array.dtype not in (np.float16, np.float32) or not math.prod(array.shape):
        found = "missing" if array is None else f"{array.dtype} of shape {array.shape}"
        raise BundleError(f"tensor {name} is {found}, expected floats with {axes} axes")
    floats: Floats = array.astype(np.float32)
    return floats
