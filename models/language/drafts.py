"""Where drafts come from: a model on the device, or the text itself. One token at a time, with how likely it is right.

Knows nothing about the cloud or about when drafting pays.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

from isthmus.models.language.sampling import Floats, choose
from isthmus.models.messages import Sampling

if TYPE_CHECKING:  # the cloud compares texts too, and has no ONNX Runtime
    from isthmus.models.language.onnx.decoder import OnnxDecoder

NGRAM_TOKENS = (4, 3, 2)  # lengths of the text's end that are looked up, longest first
NGRAM_CONFIDENCE = {4: 0.8, 3: 0.65, 2: 0.45}  # prior; what is really accepted corrects it


class Draft(Protocol):
    """A source of drafts over one text at a time."""

    def next(self, text: Sequence[int], sampling: Sampling) -> tuple[int, float] | None:
        """The token that may follow `text` and its confidence in 0 .. 1; None when there is no idea."""


class ModelDraft:
    """A whole model on the device. Keeps what it has already run of the text, so texts should share their beginning."""

    def __init__(self, decoder: OnnxDecoder) -> None:
        self._decoder = decoder
        self._logits: tuple[list[int], Floats] | None = None  # of a text, behind it

    def next(self, text: Sequence[int], sampling: Sampling) -> tuple[int, float] | None:
        if len(text) > self._decoder.context:
            return None
        logits_V = self.logits(text)
        token = choose(logits_V, sampling, len(text))
        return token, probability(logits_V, token)

    def logits(self, text: Sequence[int]) -> Floats:
        """Logits (vocab,) behind `text`. Raises InvalidInput when it is longer than the device's context."""
        if self._logits is not None and self._logits[0] == list(text):
            return self._logits[1]
        common = min(shared_length(self._decoder.ids, text), len(text) - 1)
        self._decoder.truncate(common)
        logits_V = self._decoder.extend(text[common:])
        self._logits = list(text), logits_V
        return logits_V


class LookupDraft:
    """What followed the last time the text ended like this (prompt lookup, Saxena 2023): costs nothing."""

    def __init__(self) -> None:
        self._text: list[int] = []
        self._last: dict[tuple[int, ...], int] = {}  # n-gram -> index of what followed it last

    def next(self, text: Sequence[int], sampling: Sampling) -> tuple[int, float] | None:
        self._learn(text)
        for length in NGRAM_TOKENS:
            place = self._last.get(tuple(text[-length:])) if len(text) >= length else None
            if place is not None:
                return self._text[place], NGRAM_CONFIDENCE[length]
        return None

    def _learn(self, text: Sequence[int]) -> None:
        """Index n-grams that have a follower. A text that went another way is read again."""
        common = shared_length(self._text, text)
        if common < len(self._text):
            self._text, self._last, common = [], {}, 0
        for index in range(max(common, 1), len(text)):
            for length in NGRAM_TOKENS:
                if index >= length:
                    self._last[tuple(text[index - length : index])] = index
        self._text = list(text)


def shared_length(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the common beginning."""
    limit = min(len(one), len(other))
    if list(one[:limit]) == list(other[:limit]):
        return limit
    return next(index for index in range(limit) if one[index] != other[index])


def probability(logits_V: Floats, token: int) -> float:
    """Softmax of one token at temperature 1."""
    return float(1 / np.exp(logits_V - logits_V[token]).sum())
