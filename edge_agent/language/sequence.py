"""One answer's tokens: the prompt, what was generated so far, and when it ends. Knows nothing about who generates."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Literal

from isthmus.edge_agent.language.request import GenerationRequest


class AnswerSequence:
    """The prompt's tokens with those of the answer, which only grow."""

    def __init__(self, request: GenerationRequest, eos_ids: frozenset[int]) -> None:
        self.request = request
        self.tokens = list(request.prompt)
        self.finished = False  # an end-of-text token, or as many tokens as requested
        self.cloud_model = b""  # fingerprint of the cloud's model that decides tokens of it; empty: none has
        self._eos_ids = eos_ids

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def generated(self) -> int:
        """Tokens of the answer so far."""
        return len(self.tokens) - len(self.request.prompt)

    @property
    def remaining(self) -> int:
        """Tokens that the answer may still have."""
        return self.request.max_tokens - self.generated

    @property
    def finish(self) -> Literal["stop", "length"]:
        """Why a finished answer ended."""
        return "stop" if self.generated and self.ends(self.tokens[-1]) else "length"

    def ends(self, token: int) -> bool:
        """Whether `token` marks the end of a text."""
        return token in self._eos_ids

    def ends_at(self, ids: Iterable[int]) -> bool:
        """Whether these are the tokens that end it."""
        return self._eos_ids == frozenset(ids)

    def fork(self, max_tokens: int) -> AnswerSequence:
        """Another sequence with the same prompt, empty, which ends alike or after so many tokens."""
        return AnswerSequence(replace(self.request, max_tokens=max_tokens), self._eos_ids)

    def append(self, token: int) -> None:
        """Commit one token."""
        self.tokens.append(token)
        self.finished = self.remaining <= 0 or self.ends(token)
