"""Rounds in flight over a remote session, the drafts they carry, and what the cloud commits of them.

    tokens (committed) | drafts: in rounds in flight, then not sent yet

The cloud decides every token, by one routine whoever drafts. Knows nothing about when to draft or send.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from isthmus.edge_agent.language.remote_session import RemoteSession
from isthmus.edge_agent.language.request import Source, Token, cloud_token
from isthmus.edge_agent.language.sequence import AnswerSequence
from isthmus.edge_agent.language.stats import GenerationStats
from isthmus.edge_agent.policy.speculation import SpeculationStats
from isthmus.models.errors import ContextGone, InvalidReply
from isthmus.models.messages import Committed, Round


@dataclass
class SentRound:
    """A round in flight; not `live` when the text is known to have gone another way."""

    base: int
    draft: tuple[int, ...]
    live: bool = True


class Rounds:
    """What is in flight of one answer."""

    def __init__(
        self, session: RemoteSession, sequence: AnswerSequence, stats: GenerationStats, speculation: SpeculationStats
    ) -> None:
        self.drafts: list[tuple[int, float]] = []  # ids with their confidence
        self.sent = 0  # of `drafts`, in rounds in flight
        self.streaming = False  # whether the cloud may decode by itself after a round
        self._session, self._sequence, self._stats, self._speculation = session, sequence, stats, speculation
        self._in_flight: deque[SentRound] = deque()
        self._drafted_for = len(sequence)  # tokens that `drafts` follow
        self._first = True  # the next reply is the first after an opening: it has read the prompt

    def __len__(self) -> int:
        """Rounds in flight."""
        return len(self._in_flight)

    @property
    def live(self) -> int:
        """Rounds in flight that still follow the text."""
        return sum(sent.live for sent in self._in_flight)

    @property
    def unsent(self) -> tuple[int, ...]:
        """Ids of drafts that no round carries yet."""
        return tuple(id_ for id_, _ in self.drafts[self.sent :])

    def open(self) -> None:
        """Open the session; drafts for a text that others have continued are dropped."""
        if self._drafted_for != len(self._sequence):
            self.clear()
        self._in_flight.clear()
        self.sent, self._first = 0, True
        self._session.open()

    def clear(self) -> None:
        """Drop the drafts."""
        self.drafts, self.sent, self._drafted_for = [], 0, len(self._sequence)

    def send(self, draft: tuple[int, ...] = ()) -> None:
        """Ask for a round, whose draft follows what was sent."""
        base = len(self._sequence) + self.sent
        try:
            self._session.send(Round(base, draft, self._sequence.remaining - 1 if self.streaming else 0))
        except ContextGone:
            self._reopen()
            return
        self._in_flight.append(SentRound(base, draft))

    def poll(self) -> Committed | None:
        """A reply that is there already."""
        try:
            return self._session.poll()
        except ContextGone:
            self._reopen()
            return None

    def receive(self) -> Committed:
        """The next reply, waiting for it."""
        while True:
            try:
                return self._session.receive()
            except ContextGone:
                self._reopen()

    def commit(self, committed: Committed) -> Iterator[Token]:
        """What a reply adds to the text. Raises InvalidReply for one that no round of this text can have."""
        if committed.base > len(self._sequence) or not (committed.extension or self._in_flight):
            raise InvalidReply("the cloud answered what it was not asked")
        sent = SentRound(committed.base, ()) if committed.extension else self._in_flight.popleft()
        if committed.accepted > len(sent.draft):
            raise InvalidReply("the cloud accepted more tokens than were drafted")
        self._count(committed)
        if committed.base != sent.base or not (committed.accepted or committed.tokens):
            if sent.live:
                raise InvalidReply("the cloud holds another text than it committed")
            return  # the draft was stale
        ids = [*sent.draft[: committed.accepted], *committed.tokens]
        known = len(self._sequence) - committed.base
        fresh = ids[known:][: self._sequence.remaining]
        self._compare(fresh)
        logprobs = committed.logprobs[-len(ids[known:]) :] if committed.logprobs else ()
        for index, id_ in enumerate(fresh):
            source: Source = "draft" if known + index < committed.accepted else "cloud"
            self._sequence.append(id_)
            self._session.held = self._drafted_for = len(self._sequence)
            self._stats.accepted += source == "draft"
            yield cloud_token(id_, source, logprobs[index] if index < len(logprobs) else None)
            if self._sequence.finished:
                return

    def _reopen(self) -> None:
        self.clear()
        self._in_flight.clear()
        self._first = True
        self._session.reopen()
        self.send()

    def _compare(self, fresh: Sequence[int]) -> None:
        """Hold the drafts against what the cloud chose: learn from it, and drop drafts of another text."""
        matched = 0
        for (drafted, confidence), id_ in zip(self.drafts, fresh, strict=False):
            self._speculation.acceptance.observe(confidence, drafted == id_)
            if drafted != id_:
                break
            matched += 1
        if matched == min(len(fresh), len(self.drafts)):
            self.drafts = self.drafts[matched:]
            self.sent = max(self.sent - len(fresh), 0)
            return
        self._stats.rejected += max(self.sent - matched, 0)
        self.drafts, self.sent = [], 0
        for sent in self._in_flight:
            sent.live = False

    def _count(self, committed: Committed) -> None:
        self._stats.count_reply(committed, self._first)
        self._first = False
        self._speculation.observe_reply(committed)
