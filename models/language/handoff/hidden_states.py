"""Hidden states of a language model as bytes: prediction, transform -> integers -> rANS, and back, at several rates.

    row_H --/ its rms--> - middle --> transform --> - prediction --> (C, 1, 1), log2 of the rms as one channel more
                                                        |                             |
                           embeddings of its token and of the one before         codec --> bytes

Rows differ in size by orders of magnitude, so a row is sent as a shape and a size. Both ends know the text, so what
its tokens say of a row is not sent. The transform is one after which an error of any component does the same harm to
what is decided later; steps are therefore equal for all, and what is small costs nothing. Integers and tables are
portable, the floats are not: both ends predict a little differently, which adds an error, but breaks nothing.
Knows nothing about layers or sessions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from isthmus.models.codecs.checkerboard import ContextualCodec, from_tensors
from isthmus.models.errors import BundleError, InvalidInput
from isthmus.models.language.packing import Floats, matrix, unpacked

SMALLEST = 1e-6  # added to a row's root mean square
TOKENS = 2  # whose embeddings a row is predicted from: the one before, and its own


@dataclass(frozen=True)
class Transform:
    """Rows (N, H) <-> latents (N, H + 1): components of a row divided by its size, and log2 of that; less a guess.

    matrix (H, H); middle (H + 1); predictor (H, TOKENS * H), from `pairs` of tokens to components.
    """

    matrix_CH: Floats
    middle_H1: Floats
    predictor_CT: Floats
    inverse_HC: Floats

    @classmethod
    def of(cls, matrix_CH: Floats, middle_H1: Floats, predictor_CT: Floats) -> Self:
        """Raises BundleError for a matrix that cannot be inverted."""
        try:
            inverse_HC = np.linalg.inv(matrix_CH.astype(np.float64)).astype(np.float32)
        except np.linalg.LinAlgError as error:
            raise BundleError("the transform of hidden states has no inverse") from error
        if not np.isfinite(inverse_HC).all():
            raise BundleError("the transform of hidden states has no finite inverse")
        return cls(matrix_CH, middle_H1, predictor_CT, inverse_HC)

    def latents(self, rows_NH: Floats, pairs_NT: Floats) -> Floats:
        """Of rows, with `pairs` of their tokens."""
        size_N1 = sizes(rows_NH)
        shape_NC = (rows_NH / size_N1 - self.middle_H1[:-1]) @ self.matrix_CH.T
        found_NC = shape_NC - pairs_NT @ self.predictor_CT.T
        return np.asarray(np.concatenate([found_NC, np.log2(size_N1) - self.middle_H1[-1]], axis=1), np.float32)

    def rows(self, latents_NC: Floats, pairs_NT: Floats) -> Floats:
        """The inverse of `latents`."""
        shape_NC = latents_NC[:, :-1] + pairs_NT @ self.predictor_CT.T
        shape_NH = shape_NC @ self.inverse_HC.T + self.middle_H1[:-1]
        size_N1 = np.exp2(np.clip(latents_NC[:, -1:] + self.middle_H1[-1], -60, 60))
        return np.asarray(shape_NH * size_N1, np.float32)


class StateCodec:
    """Codes rows (hidden,) one by one, so that any of them may be dropped or sent again."""

    def __init__(self, tensors: Mapping[str, NDArray[Any]], hidden: int, rates: int, max_bytes: int) -> None:
        """Raises BundleError when a tensor is missing or does not fit."""
        matrix_CH, predictor_CT = unpacked(tensors, "transform"), unpacked(tensors, "predictor")
        middle_H1 = matrix(tensors, "middle", 1)
        found = matrix_CH.shape, predictor_CT.shape, middle_H1.shape
        if found != ((hidden, hidden), (hidden, TOKENS * hidden), (hidden + 1,)):
            raise BundleError(f"transform, predictor and middle have shapes {found}, the model {hidden} hidden values")
        self._transform = Transform.of(matrix_CH, middle_H1, predictor_CT)
        self._codec = ContextualCodec(from_tensors(tensors, rates), (hidden + 1, 1, 1), max_bytes)
        self.rates = self._codec.rates

    def encode(self, rows_NH: Floats, embedded_MH: Floats, rate: int) -> list[bytes]:
        """A payload for each row. `embedded_MH` (N + 1, hidden): of the token before the first, and of the rows' own.

        Raises InvalidInput for rows that are not finite, PayloadTooLarge when a row does not fit into the cap.
        """
        if not np.isfinite(rows_NH).all():
            raise InvalidInput("a hidden state holds values that are not finite")
        latents_NC = self._transform.latents(rows_NH, pairs(embedded_MH[:-1], embedded_MH[1:]))
        return [self._codec.encode(self._codec.quantise(each[:, None, None], rate), rate) for each in latents_NC]

    def decode(self, payloads: Sequence[bytes], embedded_MH: Floats, rate: int) -> Floats:
        """The rows (N, hidden). Raises InvalidInput, PayloadTooLarge, PayloadCorrupt."""
        found = [self._codec.dequantise(self._codec.decode(payload, rate), rate)[:, 0, 0] for payload in payloads]
        latents_NC = np.stack(found) if found else np.zeros((0, self._codec.shape_CHW[0]), np.float32)
        return self._transform.rows(latents_NC, pairs(embedded_MH[:-1], embedded_MH[1:]))


def pairs(before_NH: Floats, own_NH: Floats) -> Floats:
    """Embeddings of the tokens before rows, and of the rows' own, without their sizes: (N, TOKENS * H)."""
    return np.concatenate([before_NH / sizes(before_NH), own_NH / sizes(own_NH)], axis=1, dtype=np.float32)


def sizes(rows_NH: Floats) -> NDArray[np.float64]:
    """Root mean square (N, 1) of each row, never 0."""
    found: NDArray[np.float64] = (
        np.sqrt(np.mean(np.square(rows_NH, dtype=np.float64), axis=1, keepdims=True)) + SMALLEST
    )
    return found
