"""The cloud's answer to a prompt that was encoded for a device of another vocabulary.

    prompt's text --cloud's tokenizer--> a sequence of its own --arm cloud--> tokens that name their tokenizer

Where no cloud begins it, the device's draft is the answer.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import replace
from typing import Protocol

from isthmus.edge_agent.language.arms.auto import RunningArm
from isthmus.edge_agent.language.request import Token
from isthmus.edge_agent.language.sequence import AnswerSequence
from isthmus.edge_agent.language.stats import GenerationStats
from isthmus.edge_agent.policy.arms import Arm
from isthmus.models.errors import LinkDown
from isthmus.models.language.checkpoint.tokenizer import Tokenizer


class OtherGeneration(Protocol):
    """The cloud's answer under way."""

    sequence: AnswerSequence

    def arm(self, name: Arm) -> RunningArm:
        """The arm of this name."""

    def close(self) -> None:
        """End its sessions."""


class TranslatedArm:
    """One answer of a cloud that reads another vocabulary."""

    def __init__(
        self,
        sequence: AnswerSequence,
        stats: GenerationStats,
        other: OtherGeneration,
        tokenizer: Tokenizer,
        draft: Callable[[], Token | None] | None,
    ) -> None:
        """`other` is in the cloud's vocabulary, `tokenizer`. `draft`: the device's next; None: wait for a cloud."""
        self._sequence, self._stats, self._other = sequence, stats, other
        self._tokenizer, self._draft = tokenizer, draft

    def tokens(self) -> Generator[Token, None, None]:
        """Committed tokens. Raises IsthmusError as the arm cloud does, once that has begun."""
        try:
            with closing(self._other.arm("cloud").tokens()) as tokens:
                for token in tokens:
                    yield replace(token, tokenizer=self._tokenizer)
        except LinkDown as error:
            if self._draft is None or self._other.sequence.generated:
                raise
            yield from self._fall_back(str(error))
        finally:
            self._other.close()

    def _fall_back(self, problem: str) -> Generator[Token, None, None]:
        assert self._draft is not None  # checked before
        self._stats.fell_back = True
        while not self._sequence.finished and (token := self._draft()) is not None:
            self._stats.degrade(problem)
            self._sequence.append(token.id)
            yield token
        if not self._sequence.generated:
            raise LinkDown(problem)
        self._sequence.finished = True
