"""How good a whole answer of a device's model is, and how good it will be: from likelihoods alone, in any vocabulary.

    prompt -> first token's likelihoods, length ------------> query head -> how likely the answer will do
    answer -> log-probabilities, entropies, repeats, length -> verifier  -> how likely it does

An answer's score is the least of its running scores, at every few tokens and at its end. So an answer that falls below
a threshold once stays below it, and need not be finished. Sources: Hybrid LLM (Ding et al., ICLR 2024) for the query
router, with likelihoods of the small model as its inputs in place of the text; FrugalGPT (Chen et al., 2023) for the
cascade.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from isthmus.models.errors import BundleError
from isthmus.models.language.packing import Floats, matrix

CHECK_TOKENS = 8  # after so many more, an answer under way is scored again
NGRAM_TOKENS = 3  # of the repeats that are counted
RUNNING, ENDED, CUT = 0.0, 1.0, -1.0  # how far an answer is: under way, ended by itself, at its longest
QUERY_FEATURES = 4
ANSWER_FEATURES = QUERY_FEATURES + 10


def token_likelihoods(logits_V: Floats, token: int) -> tuple[float, float, float]:
    """Log-probability of `token`, entropy in nats, and the margin between the two likeliest log-probabilities."""
    gaps_V = logits_V.astype(np.float64) - float(logits_V.max())
    weights_V = np.exp(gaps_V)
    total = float(weights_V.sum())
    second, first = np.partition(gaps_V, -2)[-2:] if len(gaps_V) > 1 else (gaps_V[0], gaps_V[0])
    entropy = math.log(total) - float((weights_V * gaps_V).sum()) / total
    return float(gaps_V[token]) - math.log(total), entropy, float(first - second)


class AnswerFeatures:
    """What is known of one answer, token by token."""

    def __init__(self, prompt_tokens: int) -> None:
        self._prompt_tokens = prompt_tokens
        self._ids: list[int] = []
        self._likelihoods: list[tuple[float, float, float]] = []
        self._ngrams: set[tuple[int, ...]] = set()
        self._repeats = 0

    def __len__(self) -> int:
        """Tokens so far."""
        return len(self._ids)

    def add(self, logits_V: Floats, token: int) -> None:
        """The answer's next token, which was chosen from these logits."""
        self._ids.append(token)
        self._likelihoods.append(token_likelihoods(logits_V, token))
        if len(self._ids) >= NGRAM_TOKENS:
            ngram = tuple(self._ids[-NGRAM_TOKENS:])
            self._repeats += ngram in self._ngrams
            self._ngrams.add(ngram)

    def query_features(self) -> Floats:
        """Inputs of the query head (QUERY_FEATURES,): of the prompt and the first token's likelihoods."""
        logprob, entropy, margin = self._likelihoods[0]
        return np.array([logprob, entropy, margin, math.log1p(self._prompt_tokens)], np.float32)

    def features(self, state: float) -> Floats:
        """Inputs of the verifier (ANSWER_FEATURES,). `state`: RUNNING, ENDED or CUT."""
        logprob_T, entropy_T, margin_T = np.array(self._likelihoods).T
        low, middle = np.quantile(logprob_T, (0.1, 0.5))
        answer = [
            logprob_T.mean(), logprob_T.min(), low, middle, entropy_T.mean(), entropy_T.max(), margin_T.mean(),
            math.log1p(len(self)), state, self._repeats / len(self),
        ]  # fmt: skip
        return np.concatenate([self.query_features(), np.array(answer, np.float32)])


@dataclass(frozen=True)
class LogisticHead:
    """A probability from features (E,): a few hundred prompts are too few for a hidden layer."""

    weight_E: Floats
    bias: float

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, NDArray[Any]], name: str, inputs: int) -> Self:
        """Raises BundleError when a tensor is missing or has the wrong shape."""
        weight_E, bias = matrix(tensors, f"{name}.weight", 1), matrix(tensors, f"{name}.bias", 1)
        if weight_E.shape != (inputs,) or bias.shape != (1,):
            raise BundleError(
                f"tensors {name}.* have shapes {weight_E.shape} and {bias.shape}, expected {inputs} and 1"
            )
        return cls(weight_E, float(bias[0]))

    def tensors(self, name: str) -> dict[str, NDArray[Any]]:
        """As a bundle stores it."""
        return {f"{name}.weight": self.weight_E, f"{name}.bias": np.array([self.bias], np.float32)}

    def predict(self, features_E: Floats) -> Floats:
        """Probabilities (..) for features (.., E)."""
        return np.asarray(1 / (1 + np.exp(-np.clip(features_E @ self.weight_E + self.bias, -60, 60))), np.float32)

    def __call__(self, features_E: Floats) -> float:
        return float(self.predict(features_E))


@dataclass(frozen=True)
class AnswerVerifier:
    """Both heads of a pair."""

    query: LogisticHead
    answer: LogisticHead

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, NDArray[Any]]) -> Self:
        """Raises BundleError when a tensor is missing or has the wrong shape."""
        return cls(
            LogisticHead.from_tensors(tensors, "query", QUERY_FEATURES),
            LogisticHead.from_tensors(tensors, "answer", ANSWER_FEATURES),
        )

    def tensors(self) -> dict[str, NDArray[Any]]:
        """As a bundle stores them."""
        return {**self.query.tensors("query"), **self.answer.tensors("answer")}

    def query_score(self, features: AnswerFeatures) -> float:
        """How likely the answer will do, by its first token."""
        return self.query(features.query_features())

    def running_score(self, features: AnswerFeatures, state: float) -> float:
        """How likely the answer does, by what there is of it."""
        return self.answer(features.features(state))


def is_due(tokens: int, state: float) -> bool:
    """Whether an answer of so many tokens is scored now."""
    return state != RUNNING or tokens % CHECK_TOKENS == 0


def least_score(verifier: AnswerVerifier, features: Sequence[Floats]) -> float:
    """The score of an answer whose features at each check are `features`."""
    return float(verifier.answer.predict(np.stack(features)).min())
