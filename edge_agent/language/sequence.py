"""One answer's tokens: the prompt, what was generated so far, how the next is chosen, and when it ends.

Knows nothing about who generates.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Literal

from isthmus.edge_agent.language.request import GenerationRequest, Token, local_token
from isthmus.models.language.processors import OpenState, TokenChooser, without_grammars
from isthmus.models.language.sampling import Floats


class AnswerSequence:
    """The prompt's tokens with those of the answer, which only grow."""

    def __init__(
        self, request: GenerationRequest, eos_ids: frozenset[int], open_state: OpenState = without_grammars
    ) -> None:
        """`open_state`: compiles the request's grammar, if it has one."""
        self.request = request
        self._open_state = open_state
        self.chooser = TokenChooser(request.sampling, len(request.prompt), open_state)
        self.tokens = list(request.prompt)
        self.finished = False  # an end-of-text token, or as many tokens as requested
        self.cloud_model = b""  # fingerprint of the cloud's model that decides tokens of it; empty: none has
        self.end_ids = eos_ids

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def generated(self) -> int:
        """Tokens of the answer so far."""
        return len(self.tokens) - len(self.request.prompt)

    @property
    def answer_start(self) -> int:
        """Position where the answer begins, for a cloud that has to know; else 0."""
        return len(self.request.prompt) if self.request.sampling.reads_answer else 0

    @property
    def remaining(self) -> int:
        """Tokens that the answer may still have."""
        return self.request.max_tokens - self.generated

    @property
    def finish(self) -> Literal["stop", "length"]:
        """Why a finished answer ended."""
        return "stop" if self.generated and self.ends(self.tokens[-1]) else "length"

    def choose(self, logits_V: Floats, text: Sequence[int]) -> Token:
        """The token that the local model decides after `text`, which begins with the prompt."""
        return local_token(logits_V, self.chooser.choose(logits_V, text), self.request)

    def forced(self, text: Sequence[int]) -> Token | None:
        """The only token that the grammar allows after `text`: no model is asked. None where there are several.

        None also where log-probabilities are wanted, which only a model has.
        """
        id_ = self.chooser.forced(text) if self.request.top_logprobs is None else None
        return None if id_ is None else Token(id_, "edge")

    def ends(self, token: int) -> bool:
        """Whether `token` marks the end of a text."""
        return token in self.end_ids

    def ends_at(self, ids: Iterable[int]) -> bool:
        """Whether these are the tokens that end it."""
        return self.end_ids == frozenset(ids)

    def fork(self, max_tokens: int) -> AnswerSequence:
        """Another sequence with the same prompt, empty, which ends alike or after so many tokens."""
        return AnswerSequence(replace(self.request, max_tokens=max_tokens), self.end_ids, self._open_state)

    def append(self, token: int) -> None:
        """Commit one token."""
        self.tokens.append(token)
        self.finished = self.remaining <= 0 or self.ends(token)
