"""The arm `edge`: the local model generates the whole answer, and nothing leaves the device."""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING

from isthmus.edge_agent.language.request import Token
from isthmus.edge_agent.language.sequence import AnswerSequence

if TYPE_CHECKING:  # it brings ONNX Runtime
    from isthmus.edge_agent.language.local_model import LocalSession


class LocalArm:
    """One answer of the local model."""

    def __init__(self, sequence: AnswerSequence, local: LocalSession) -> None:
        self._sequence, self._local = sequence, local

    def tokens(self) -> Generator[Token, None, None]:
        """Tokens until the answer is finished."""
        sequence = self._sequence
        while not sequence.finished:
            text = sequence.tokens
            token = sequence.forced(text) or sequence.choose(self._local.logits(text), text)
            sequence.append(token.id)
            yield token
