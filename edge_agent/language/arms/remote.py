"""The arm `cloud`: the prompt goes up, and the cloud decodes by itself until the answer is finished."""

from __future__ import annotations

from collections.abc import Generator, Iterator

from isthmus.edge_agent.language.arms.rounds import Rounds
from isthmus.edge_agent.language.remote_session import Fallback, RemoteSession
from isthmus.edge_agent.language.request import Token
from isthmus.edge_agent.language.sequence import AnswerSequence


class RemoteArm:
    """One answer of the cloud's model."""

    def __init__(
        self, sequence: AnswerSequence, session: RemoteSession, rounds: Rounds, fallback: Fallback | None
    ) -> None:
        """`fallback` generates while no replica can be used; None: wait for one."""
        self._sequence, self._session, self._rounds, self._fallback = sequence, session, rounds, fallback

    def tokens(self) -> Generator[Token, None, None]:
        """Committed tokens. Raises as RemoteSession.tokens."""
        try:
            yield from self._session.tokens(self._stream, self._fallback, lambda: self._sequence.finished)
        finally:
            self._session.disconnect()

    def _stream(self) -> Iterator[Token]:
        self._rounds.open()
        self._rounds.streaming = True
        self._rounds.send()
        while not self._sequence.finished:
            yield from self._rounds.commit(self._rounds.receive())
