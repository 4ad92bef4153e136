"""How likely a choice made on the device is the full model's, from the likelihoods behind it and the text before it.

An exit has a judge, and so has the device's own copy of the model. Sources: a learnt confidence beats the softmax's own
(CALM, Schuster et al., 2022, section 3.5); that a text goes on as it did before is what drafts by prompt lookup
live of (Saxena, 2023), as evidence it is ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from isthmus.models.errors import BundleError
from isthmus.models.language.packing import Floats, matrix

LIKELIEST, ECHOES = 4, 3
EVIDENCE = LIKELIEST + 1 + ECHOES  # values


@dataclass(frozen=True)
class Judge:
    """How likely right, by one hidden layer over what `evidence` gives."""

    first_FE: Floats
    first_F: Floats
    second_F: Floats
    second: float

    @classmethod
    def of(cls, tensors: Mapping[str, NDArray[Any]]) -> Judge:
        """Raises BundleError."""
        first_FE, first_F = matrix(tensors, "judge.0.weight", 2), matrix(tensors, "judge.0.bias", 1)
        second_1F, second_1 = matrix(tensors, "judge.2.weight", 2), matrix(tensors, "judge.2.bias", 1)
        if (
            first_FE.shape != (len(first_F), EVIDENCE)
            or second_1F.shape != (1, *first_F.shape)
            or second_1.shape != (1,)
        ):
            raise BundleError("the tensors of judge do not fit each other")
        return cls(first_FE, first_F, second_1F[0], float(second_1[0]))

    def __call__(self, logits_V: Floats, text: Sequence[int]) -> float:
        return float(self.likely(evidence(logits_V, text)))

    def likely(self, evidence_E: Floats) -> Floats:
        """How likely right, for each evidence (.., EVIDENCE)."""
        hidden_F = np.maximum(evidence_E @ self.first_FE.T + self.first_F, 0)
        return np.asarray(1 / (1 + np.exp(-(hidden_F @ self.second_F + self.second))), np.float32)


def evidence(logits_V: Floats, text: Sequence[int]) -> Floats:
    """What a judge looks at (EVIDENCE,), of logits behind `text`, which has a token at least.

    The log-probabilities of the likeliest tokens, the entropy, and how the text went on before. Not the row: that
    taught judges the texts they were trained on, and on others they were worse than the softmax.
    """
    places = np.argpartition(logits_V, -LIKELIEST)[-LIKELIEST:]
    places = places[np.argsort(-logits_V[places], kind="stable")]
    gaps_V = logits_V - logits_V[places[0]]
    weights_V = np.exp(gaps_V)
    total = weights_V.sum()
    log_total = float(np.log(total))
    entropy = log_total - float((weights_V * gaps_V).sum() / total)
    return np.array([*(gaps_V[places] - log_total), entropy, *echoes(text, int(places[0]))], np.float32)


def echoes(text: Sequence[int], choice: int) -> list[float]:
    """For the last token of a text, the last two and the last three: what followed when they last stood there before.

    1: the choice; -1: another; 0: they never did.
    """
    ids_T, found = np.asarray(text), [0.0] * ECHOES
    places = np.flatnonzero(ids_T[:-1] == ids_T[-1])
    for more in range(min(ECHOES, len(ids_T))):
        if more:
            places = places[places >= more]
            places = places[ids_T[places - more] == ids_T[-1 - more]]
        if len(places):
            found[more] = 1.0 if ids_T[places[-1] + 1] == choice else -1.0
    return found
