"""Where logits become a token: biases, penalties, grammar, temperature and noise, in this order, at both ends alike.

    logits (float32) + bias - frequency_penalty x count - presence_penalty x (count > 0), in the grammar -> choose

Each step rounds to float32, and counts are of the answer's tokens (OpenAI's definition): for equal logits, text and
sampling the token is the same to the last bit, whoever chooses, and whatever was asked before. Log-probabilities, which
`sampling.logprobs` reads off the logits, are those of the model, before any of this.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from isthmus.models.language.sampling import Floats, choose
from isthmus.models.messages import Grammar, Sampling

if TYPE_CHECKING:  # it brings llguidance, which a sampling without a grammar does without
    from isthmus.models.language.grammar import GrammarState

NEVER = np.float32(-1e30)  # a logit that is never chosen; finite, so that what reads it can compute with it
STATE_BYTES = 1 << 20  # the states of one grammar share most of theirs
UNLIKELY = np.float32(30.0)  # below the likeliest token: what a confidence is told of tokens that cannot follow

OpenState: TypeAlias = "Callable[[Grammar], GrammarState]"


def without_grammars(grammar: Grammar) -> GrammarState:
    """For a chooser whose sampling has no grammar."""
    raise AssertionError(f"a grammar of kind {grammar.kind} where none was expected")


class TokenChooser:
    """Chooses the tokens of one answer. Its methods are functions of their arguments, though not from several threads.

    `text`: the prompt's tokens with those of the answer so far. Methods raise InvalidInput for a grammar that cannot be
    used, and for an answer that has left it.
    """

    def __init__(self, sampling: Sampling, start: int = 0, open_state: OpenState = without_grammars) -> None:
        """`start`: position where the answer begins. `open_state` compiles a grammar when it is first needed."""
        self.sampling, self._start, self._open_state = sampling, start, open_state
        self._state: GrammarState | None = None
        self._ids = np.array([id_ for id_, _ in sampling.logit_bias], np.int64)
        self._biases = np.array([bias for _, bias in sampling.logit_bias], np.float32)
        self._penalties = np.float32(sampling.frequency_penalty), np.float32(sampling.presence_penalty)

    @property
    def plain(self) -> bool:
        """Whether tokens are chosen by logits and position alone."""
        return not self.sampling.processors

    @property
    def state_bytes(self) -> int:
        """Memory that the state of a grammar counts for."""
        return STATE_BYTES if self.sampling.grammar else 0

    def forced(self, text: Sequence[int]) -> int | None:
        """The token that follows `text` whatever the logits; None where they decide."""
        if self.sampling.grammar is None:
            return None
        return self._grammar.forced(text[self._start :])

    def choose(self, logits_V: Floats, text: Sequence[int]) -> int:
        """The token after `text`, given the logits there."""
        if self.plain:
            return choose(logits_V, self.sampling, len(text))
        if (forced := self.forced(text)) is not None:
            return forced
        return choose(self.processed(logits_V, text), self.sampling, len(text))

    def allows(self, text: Sequence[int], token: int) -> bool:
        """Whether the grammar allows a token after `text`."""
        if self.sampling.grammar is None:
            return True
        answer = text[self._start :]
        if (forced := self._grammar.forced(answer)) is not None:
            return token == forced
        mask_V = self._grammar.mask(answer)
        return token < len(mask_V) and bool(mask_V[token])

    def processed(self, logits_V: Floats, text: Sequence[int]) -> Floats:
        """The logits that `text` allows: biased, penalised, NEVER outside of the grammar. A copy unless `plain`."""
        if self.plain:
            return logits_V
        result_V = logits_V.astype(np.float32, copy=True)
        answer = text[self._start :]
        result_V[self._ids] += self._biases
        if any(self._penalties) and len(answer):
            ids, counts = np.unique(np.asarray(answer, np.int64), return_counts=True)
            frequency, presence = self._penalties
            result_V[ids] -= frequency * counts.astype(np.float32)
            result_V[ids] -= presence
        if self.sampling.grammar is not None:
            mask_V = self._grammar.mask(answer)
            result_V[: len(mask_V)][~mask_V] = NEVER
            result_V[len(mask_V) :] = NEVER  # rows of the embedding that stand for no token
        return result_V

    def for_confidence(self, logits_V: Floats, text: Sequence[int]) -> Floats:
        """Logits for a confidence head: as `processed`, and none further below the likeliest than a model's own."""
        if self.plain:
            return logits_V
        result_V = self.processed(logits_V, text)
        return np.maximum(result_V, result_V.max() - UNLIKELY)

    @property
    def _grammar(self) -> GrammarState:
        if self._state is None:
            assert self.sampling.grammar is not None  # who asks has seen it
            self._state = self._open_state(self.sampling.grammar)
        return self._state
