"""Remote token queries: the cloud decides single tokens of an answer that is generated elsewhere, over one open stream.

    ask     an opening with the tokens since the last query, and a round without drafts
    tokens  the reply's token; by another replica or the fallback where this one is lost

Knows nothing about who decides which tokens to query.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import suppress

from isthmus.edge_agent.language.remote_session import Fallback, RemoteSession
from isthmus.edge_agent.language.request import Token, cloud_token
from isthmus.edge_agent.language.sequence import AnswerSequence
from isthmus.edge_agent.language.stats import GenerationStats
from isthmus.edge_agent.policy.speculation import SpeculationStats
from isthmus.models.errors import ContextGone, InvalidReply, IsthmusError, LinkError, OverBudget, ServiceError
from isthmus.models.messages import Committed, Round


class RemoteQuery:
    """Queries of one answer, one at a time."""

    def __init__(
        self, session: RemoteSession, sequence: AnswerSequence, stats: GenerationStats, speculation: SpeculationStats
    ) -> None:
        self._session, self._sequence, self._stats, self._speculation = session, sequence, stats, speculation
        self._asked: int | None = None  # length of the text whose next token was queried

    @property
    def answered(self) -> bool:
        """Whether the reply is there, or will not come."""
        return self._session.answered

    @property
    def rtt_s(self) -> float:
        """Round trip to the replica that answers."""
        return self._session.rtt_s

    @property
    def is_pending(self) -> bool:
        """Whether the next token is queried already."""
        return self._asked == len(self._sequence)

    def ask(self) -> None:
        """Query the next token, in the background. Where no replica can be reached, `tokens` finds out."""
        if self._session.prepare():
            try:
                self._send()
            except (LinkError, OverBudget, ServiceError):
                self._session.disconnect()
                self._asked = None

    def tokens(self, fallback: Fallback | None) -> Generator[Token, None, None]:
        """The next token, once. Raises as RemoteSession.tokens."""
        length = len(self._sequence)
        yield from self._session.tokens(self._remote, fallback, lambda: len(self._sequence) > length)

    def drop(self) -> None:
        """Take the reply of a query that is not needed; while it is not there, the stream cannot be used again."""
        if self._asked is None or not self._session.connected:
            return
        with suppress(IsthmusError):
            if (committed := self._session.poll()) is not None:
                self._count(committed)
                self._asked = None
                return
        self._asked = None
        self._session.disconnect()

    def close(self) -> None:
        """Give up a query that is not needed, and the stream."""
        self.drop()
        self._session.disconnect()

    def _remote(self) -> Iterator[Token]:
        if not (self._session.connected and self.is_pending):
            self._send()
        committed = self._receive()
        self._asked = None
        self._count(committed)
        if (committed.base, committed.accepted, len(committed.tokens)) != (len(self._sequence), 0, 1):
            raise InvalidReply("the cloud answered what it was not asked")
        self._sequence.append(committed.tokens[0])
        self._session.held = len(self._sequence)
        yield cloud_token(committed.tokens[0], "cloud", committed.logprobs[0] if committed.logprobs else None)

    def _receive(self) -> Committed:
        while True:
            try:
                return self._session.receive()
            except ContextGone:
                self._session.reopen()
                self._session.send(Round(len(self._sequence)))

    def _send(self) -> None:
        self.drop()
        self._session.open()
        self._session.send(Round(len(self._sequence)))
        self._asked = self._session.held = len(self._sequence)

    def _count(self, committed: Committed) -> None:
        self._stats.count_reply(committed, first=True)
        self._speculation.observe_reply(committed)
