"""A small network that predicts how likely a choice of token equals the full model's choice.

    logits, text -> features (top log-probabilities, entropy, n-gram repeats) -> hidden layer -> probability

Each exit has a confidence head, and so has each local model. Sources: a learnt confidence is better calibrated than the
softmax (CALM, Schuster et al., 2022, section 3.5). Features from earlier occurrences of an n-gram follow the idea of
prompt lookup (Saxena, 2023); their use in a confidence head is ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from isthmus.models.errors import BundleError
from isthmus.models.language.packing import Floats, matrix

TOP_LOGPROBS = 4  # of the most likely tokens
LONGEST_NGRAM = 3  # tokens; there is a feature for each length from 1 on
FEATURES = TOP_LOGPROBS + 1 + LONGEST_NGRAM


@dataclass(frozen=True)
class ConfidenceHead:
    """One hidden layer of F units over E = FEATURES inputs. A bundle stores its tensors under `judge.*`."""

    first_FE: Floats
    first_F: Floats
    second_F: Floats
    second: float

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, NDArray[Any]]) -> ConfidenceHead:
        """Raises BundleError when a tensor is missing or has the wrong shape."""
        first_FE, first_F = matrix(tensors, "judge.0.weight", 2), matrix(tensors, "judge.0.bias", 1)
        second_1F, second_1 = matrix(tensors, "judge.2.weight", 2), matrix(tensors, "judge.2.bias", 1)
        if (
            first_FE.shape != (len(first_F), FEATURES)
            or second_1F.shape != (1, *first_F.shape)
            or second_1.shape != (1,)
        ):
            raise BundleError("the shapes of the confidence head's tensors judge.* are inconsistent")
        return cls(first_FE, first_F, second_1F[0], float(second_1[0]))

    def __call__(self, logits_V: Floats, text: Sequence[int]) -> float:
        """The probability that the argmax of the logits after `text` is the full model's choice."""
        return float(self.predict(features(logits_V, text)))

    def predict(self, features_E: Floats) -> Floats:
        """Probabilities (..) for features (.., FEATURES)."""
        hidden_F = np.maximum(features_E @ self.first_FE.T + self.first_F, 0)
        return np.asarray(1 / (1 + np.exp(-(hidden_F @ self.second_F + self.second))), np.float32)


def features(logits_V: Floats, text: Sequence[int]) -> Floats:
    """Inputs of a confidence head (FEATURES,) from the logits after `text`, which holds at least one token.

    The hidden state is not among them: with it, confidence heads fitted the training texts, and were less reliable than
    the softmax on others.
    """
    top = np.argpartition(logits_V, -TOP_LOGPROBS)[-TOP_LOGPROBS:]
    top = top[np.argsort(-logits_V[top], kind="stable")]
    gaps_V = logits_V - logits_V[top[0]]
    weights_V = np.exp(gaps_V)
    total = weights_V.sum()
    log_total = float(np.log(total))
    entropy = log_total - float((weights_V * gaps_V).sum() / total)
    return np.array([*(gaps_V[top] - log_total), entropy, *ngram_repeats(text, int(top[0]))], np.float32)


def ngram_repeats(text: Sequence[int], choice: int) -> list[float]:
    """For the last 1, 2 and 3 tokens of a text: which token followed their previous occurrence.

    1 stands for `choice`, -1 for another token, 0 for no previous occurrence.
    """
    ids_T, repeats = np.asarray(text), [0.0] * LONGEST_NGRAM
    ends = np.flatnonzero(ids_T[:-1] == ids_T[-1])  # of previous occurrences
    for more in range(min(LONGEST_NGRAM, len(ids_T))):
        if more:
            ends = ends[ends >= more]
            ends = ends[ids_T[ends - more] == ids_T[-1 - more]]
        if len(ends):
            repeats[more] = 1.0 if ids_T[ends[-1] + 1] == choice else -1.0
    return repeats
