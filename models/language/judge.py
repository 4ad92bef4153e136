"""How likely a choice made on the device is the full model's, from the likelihoods behind it.

An exit has a judge, and so has the device's own copy of the model. Source: a learnt confidence beats the softmax's own
(CALM, Schuster et al., 2022, section 3.5).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.errors import BundleError
from models.language.packing import Floats, matrix

EVIDENCE = 3  # values


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

    def __call__(self, logits_V: Floats) -> float:
        return float(self.likely(evidence(logits_V)))

    def likely(self, evidence_E: Floats) -> Floats:
        """How likely right, for each evidence (.., EVIDENCE)."""
        hidden_F = np.maximum(evidence_E @ self.first_FE.T + self.first_F, 0)
        return np.asarray(1 / (1 + np.exp(-(hidden_F @ self.second_F + self.second))), np.float32)


def evidence(logits_V: Floats) -> Floats:
    """What a judge looks at (EVIDENCE,): the log-probabilities of its two likeliest tokens, and the entropy.

    Not its row: that taught judges the texts they were trained on, and on others they were worse than the softmax.
    """
    second, first = np.partition(logits_V, -2)[-2:]
    weights_V = np.exp(logits_V - first)
    total = weights_V.sum()
    log_total = float(np.log(total))
    entropy = log_total - float((weights_V * (logits_V - first)).sum() / total)
    return np.array([-log_total, second - first - log_total, entropy], np.float32)
