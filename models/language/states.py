"""Hidden states of a language model as bytes: principal components -> integers -> rANS, and back, at several rates.

    row_H --/ its rms--> - mean --> basis --> (C, 1, 1) with log2 of the rms as one channel more --codec--> bytes

Rows differ in size by orders of magnitude and mostly in a few directions, so a row is sent as a shape and a size. Steps
are equal for all components: what is small costs nothing. Integers and tables are portable; the floats are not.
Knows nothing about layers or sessions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.codecs.contextual import ContextualCodec, from_tensors
from models.errors import BundleError, InvalidInput
from models.language.packing import Floats, matrix

SMALLEST = 1e-6  # added to a row's root mean square


class StateCodec:
    """Codes rows (hidden,) one by one, so that any of them may be dropped or sent again."""

    def __init__(self, tensors: Mapping[str, NDArray[Any]], hidden: int, rates: int, max_bytes: int) -> None:
        """Raises BundleError when a tensor is missing or does not fit."""
        self._basis_CH, self._middle_H1 = matrix(tensors, "basis", 2), matrix(tensors, "middle", 1)
        if self._basis_CH.shape[1] != hidden or self._middle_H1.shape != (hidden + 1,):
            found = f"{self._basis_CH.shape} and {self._middle_H1.shape}"
            raise BundleError(f"basis and middle have shapes {found}, the model {hidden} hidden values")
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
        return self._back(np.stack(found)) if found else np.zeros((0, self._basis_CH.shape[1]), np.float32)

    def _to(self, rows_NH: Floats) -> Floats:
        if not np.isfinite(rows_NH).all():
            raise InvalidInput("a hidden state holds values that are not finite")
        return components(rows_NH, self._basis_CH, self._middle_H1)

    def _back(self, latents_NC: Floats) -> Floats:
        shape_NH = latents_NC[:, :-1] @ self._basis_CH + self._middle_H1[:-1]
        size_N1 = np.exp2(np.clip(latents_NC[:, -1:] + self._middle_H1[-1], -60, 60))
        return np.asarray(shape_NH * size_N1, np.float32)


def sizes(rows_NH: Floats) -> NDArray[np.float64]:
    """Root mean square (N, 1) of each row, never 0."""
    found: NDArray[np.float64] = (
        np.sqrt(np.mean(np.square(rows_NH, dtype=np.float64), axis=1, keepdims=True)) + SMALLEST
    )
    return found


def components(rows_NH: Floats, basis_CH: Floats, middle_H1: Floats) -> Floats:
    """Latents (N, C + 1) of rows: components of a row divided by its size, and the logarithm of that to base 2.

    Both are counted from `middle_H1`.
    """
    size_N1 = sizes(rows_NH)
    latents_NC = (rows_NH / size_N1 - middle_H1[:-1]) @ basis_CH.T
    return np.asarray(np.concatenate([latents_NC, np.log2(size_N1) - middle_H1[-1]], axis=1), np.float32)
