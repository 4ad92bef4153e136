"""Code hidden states of a language model as bytes and back, at several rates.

    state_H --/ its rms--> - mean --> transform --> - prediction --> latent (C, 1, 1), with log2 of the rms as a channel
                                                        |                             |
                     embeddings of its token and of the token before            codec --> bytes

Hidden states differ in magnitude by orders of magnitude, so each is coded as a direction and a root mean square. Both
ends know the text, so the part that its tokens predict is not sent. After the transform, an error in any component has
the same effect on the tokens decoded later; all components therefore share one quantisation step, and small ones cost
almost nothing. Integers and tables are portable, floats are not: the two ends' predictions differ slightly, which adds
a small error. Knows nothing about layers or sessions.
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

RMS_EPSILON = 1e-6  # added to the root mean square of a hidden state
PREDICTOR_TOKENS = 2  # a hidden state is predicted from the embeddings of the previous token and its own


@dataclass(frozen=True)
class Transform:
    """Hidden states (N, H) <-> latents (N, H + 1): components of a state divided by its rms, and log2 of the rms.

    matrix (H, H); middle (H + 1): means of both parts; predictor (H, PREDICTOR_TOKENS * H): a linear map from
    `predictor_inputs` to components, which is subtracted.
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

    def latents(self, states_NH: Floats, inputs_NT: Floats) -> Floats:
        """The analysis transform. `inputs_NT`: `predictor_inputs` of the states' tokens."""
        rms_N1 = root_mean_square(states_NH)
        components_NC = (states_NH / rms_N1 - self.middle_H1[:-1]) @ self.matrix_CH.T
        residual_NC = components_NC - inputs_NT @ self.predictor_CT.T
        return np.asarray(np.concatenate([residual_NC, np.log2(rms_N1) - self.middle_H1[-1]], axis=1), np.float32)

    def hidden_states(self, latents_NC: Floats, inputs_NT: Floats) -> Floats:
        """The synthesis transform, the inverse of `latents`."""
        components_NC = latents_NC[:, :-1] + inputs_NT @ self.predictor_CT.T
        direction_NH = components_NC @ self.inverse_HC.T + self.middle_H1[:-1]
        rms_N1 = np.exp2(np.clip(latents_NC[:, -1:] + self.middle_H1[-1], -60, 60))
        return np.asarray(direction_NH * rms_N1, np.float32)


class StateCodec:
    """Codes each hidden state (hidden,) on its own, so that any of them can be dropped or sent again."""

    def __init__(self, tensors: Mapping[str, NDArray[Any]], hidden: int, rates: int, max_bytes: int) -> None:
        """Raises BundleError when a tensor is missing or has the wrong shape."""
        matrix_CH, predictor_CT = unpacked(tensors, "transform"), unpacked(tensors, "predictor")
        middle_H1 = matrix(tensors, "middle", 1)
        found = matrix_CH.shape, predictor_CT.shape, middle_H1.shape
        if found != ((hidden, hidden), (hidden, PREDICTOR_TOKENS * hidden), (hidden + 1,)):
            raise BundleError(f"transform, predictor and middle have shapes {found}, the model {hidden} hidden values")
        self._transform = Transform.of(matrix_CH, middle_H1, predictor_CT)
        self._codec = ContextualCodec(from_tensors(tensors, rates), (hidden + 1, 1, 1), max_bytes)
        self.rates = self._codec.rates

    def encode(self, states_NH: Floats, embedded_MH: Floats, rate: int) -> list[bytes]:
        """One payload for each of the N hidden states.

        `embedded_MH` (N + 1, hidden): embeddings of the token before the first, then of the states' own tokens.
        Raises InvalidInput for states that are not finite, PayloadTooLarge when one exceeds the byte limit.
        """
        if not np.isfinite(states_NH).all():
            raise InvalidInput("a hidden state holds values that are not finite")
        latents_NC = self._transform.latents(states_NH, predictor_inputs(embedded_MH[:-1], embedded_MH[1:]))
        return [self._codec.encode(self._codec.quantise(each[:, None, None], rate), rate) for each in latents_NC]

    def decode(self, payloads: Sequence[bytes], embedded_MH: Floats, rate: int) -> Floats:
        """Hidden states (N, hidden), with the same embeddings. Raises InvalidInput, PayloadTooLarge, PayloadCorrupt."""
        decoded = [self._codec.dequantise(self._codec.decode(payload, rate), rate)[:, 0, 0] for payload in payloads]
        latents_NC = np.stack(decoded) if decoded else np.zeros((0, self._codec.shape_CHW[0]), np.float32)
        return self._transform.hidden_states(latents_NC, predictor_inputs(embedded_MH[:-1], embedded_MH[1:]))


def predictor_inputs(before_NH: Floats, own_NH: Floats) -> Floats:
    """Embeddings of the previous tokens and of the states' own, each divided by its rms: (N, PREDICTOR_TOKENS * H)."""
    parts = [before_NH / root_mean_square(before_NH), own_NH / root_mean_square(own_NH)]
    return np.concatenate(parts, axis=1, dtype=np.float32)


def root_mean_square(states_NH: Floats) -> NDArray[np.float64]:
    """Root mean square (N, 1) of each hidden state, never 0."""
    square_N1 = np.mean(np.square(states_NH, dtype=np.float64), axis=1, keepdims=True)
    rms_N1: NDArray[np.float64] = np.sqrt(square_N1) + RMS_EPSILON
    return rms_N1
