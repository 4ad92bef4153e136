"""Sources of draft tokens: the local model, or prompt lookup in the text itself.

A source drafts one token at a time, which the answer's grammar allows, with a confidence. Knows nothing about the cloud
or about when drafting pays off.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

from isthmus.models.language.sampling import Floats

if TYPE_CHECKING:  # the cloud uses `shared_length` and does without ONNX Runtime
    from isthmus.models.language.onnx.decoder import OnnxDecoder
    from isthmus.models.language.processors import TokenChooser

NGRAM_TOKENS = (4, 3, 2)  # suffixes of the text that are looked up, longest first
PREDICTED_CONFIDENCE = 0.9  # prior of a prediction
NGRAM_CONFIDENCE = {4: 0.8, 3: 0.65, 2: 0.45}  # prior, corrected by the acceptance that is measured


class Draft(Protocol):
    """A source of drafts for one text at a time."""

    def next(self, text: Sequence[int], chooser: TokenChooser) -> tuple[int, float] | None:
        """A draft for the token after `text` and its confidence in [0, 1], or None without a draft."""


class ModelDraft:
    """Drafts from the local model. It keeps the KV cache of the last text, for texts with a common prefix."""

    def __init__(self, decoder: OnnxDecoder) -> None:
        self._decoder = decoder
        self._logits: tuple[list[int], Floats] | None = None  # a text and the logits after it

    def next(self, text: Sequence[int], chooser: TokenChooser) -> tuple[int, float] | None:
        if len(text) > self._decoder.context:
            return None
        logits_V = self.logits(text)
        token = chooser.choose(logits_V, text)
        return token, probability(chooser.processed(logits_V, text), token)

    def logits(self, text: Sequence[int]) -> Floats:
        """Logits (vocab,) after `text`. Raises InvalidInput when it is longer than the device's context."""
        if self._logits is not None and self._logits[0] == list(text):
            return self._logits[1]
        common = min(shared_length(self._decoder.ids, text), len(text) - 1)
        self._decoder.truncate(common)
        logits_V = self._decoder.extend(text[common:])
        self._logits = list(text), logits_V
        return logits_V


class LookupDraft:
    """Drafts what followed the last earlier occurrence of the text's end (prompt lookup, Saxena 2023), at no cost."""

    def __init__(self) -> None:
        self._text: list[int] = []
        self._last: dict[tuple[int, ...], int] = {}  # n-gram -> index of the token after its last occurrence

    def next(self, text: Sequence[int], chooser: TokenChooser) -> tuple[int, float] | None:
        self._learn(text)
        for length in NGRAM_TOKENS:
            place = self._last.get(tuple(text[-length:])) if len(text) >= length else None
            if place is not None and chooser.allows(text, self._text[place]):
                return self._text[place], NGRAM_CONFIDENCE[length]
        return None

    def _learn(self, text: Sequence[int]) -> None:
        """Index the n-grams that a token follows. A text that diverged from the last one is indexed anew."""
        common = shared_length(self._text, text)
        if common < len(self._text):
            self._text, self._last, common = [], {}, 0
        for index in range(max(common, 1), len(text)):
            for length in NGRAM_TOKENS:
                if index >= length:
                    self._last[tuple(text[index - length : index])] = index
        self._text = list(text)


class PredictionDraft:
    """Drafts from a text that the answer is expected to repeat in large part, and where it does not, by prompt lookup.

    After a token that is not the prediction's it goes on where the answer's last tokens are in the prediction: at the
    next such place, or else the last one.
    """

    def __init__(self, prediction: Sequence[int], start: int) -> None:
        """`start`: tokens before the answer."""
        self._prediction, self._start = tuple(prediction), start
        self._answer: list[int] = []
        self._places: list[int | None] = [0]  # after each number of the answer's tokens; None: nowhere
        self._after: dict[tuple[int, ...], list[int]] = {}  # n-gram -> places after it, rising
        for place in range(1, len(self._prediction)):
            for length in NGRAM_TOKENS:
                if place >= length:
                    self._after.setdefault(self._prediction[place - length : place], []).append(place)
        self._lookup = LookupDraft()

    def next(self, text: Sequence[int], chooser: TokenChooser) -> tuple[int, float] | None:
        answer = list(text[self._start :])
        common = shared_length(self._answer, answer)
        self._answer, self._places = answer, self._places[: common + 1]
        for count in range(common + 1, len(answer) + 1):
            self._places.append(self._place(answer[:count], self._places[-1]))
        place = self._places[-1]
        if place is not None and place < len(self._prediction) and chooser.allows(text, self._prediction[place]):
            return self._prediction[place], PREDICTED_CONFIDENCE
        return self._lookup.next(text, chooser)

    def _place(self, answer: Sequence[int], before: int | None) -> int | None:
        """Where the prediction goes on after `answer`, whose last token was to be the one at `before`."""
        if before is not None and self._prediction[before : before + 1] == (answer[-1],):
            return before + 1
        passed = max((place for place in self._places if place is not None), default=0)
        for length in NGRAM_TOKENS:
            places = self._after.get(tuple(answer[-length:]), ()) if len(answer) >= length else ()
            if places:
                return next((place for place in places if place > passed), places[-1])
        return None


def shared_length(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the common prefix."""
    limit = min(len(one), len(other))
    if list(one[:limit]) == list(other[:limit]):
        return limit
    return next(index for index in range(limit) if one[index] != other[index])


def probability(logits_V: Floats, token: int) -> float:
    """The softmax probability of one token at temperature 1."""
    return float(1 / np.exp(logits_V - logits_V[token]).sum())
