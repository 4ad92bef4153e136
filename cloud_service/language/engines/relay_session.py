"""One session over an engine that keeps none: its tokens, its rounds in order of arrival, the task that settles them.

The engine's cache of prefixes is what it computes the session from; here are only its tokens. Knows no other session.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import deque
from dataclasses import dataclass, field, replace

from isthmus.cloud_service.language.rounds import CommittedTokens, ScheduledWork
from isthmus.cloud_service.language.session import (
    SESSION_BYTES,
    TOKEN_BYTES,
    EventQueue,
    SessionEvent,
    round_bytes,
)
from isthmus.models.errors import InvalidInput, IsthmusError
from isthmus.models.messages import MAX_SEED, Committed, Opening, Processed, Round, Sampling


@dataclass(eq=False)
class RelaySession:
    """`task` runs while a round has no reply yet."""

    opening: Opening
    sequence: CommittedTokens
    events: EventQueue
    peer: str
    rounds: deque[tuple[Round, float]] = field(default_factory=deque)
    attached: bool = True
    ending: bool = False  # the device has half-closed: None follows the last event
    task: asyncio.Task[None] | None = None
    readable: asyncio.Event = field(default_factory=asyncio.Event)  # the device has read what it had left unread
    counted_bytes: int = 0  # of `own_bytes`, as counted last
    reached: int = 0  # of its tokens, the first, that the engine was sent before
    processed: Processed = field(default_factory=Processed)  # since the last reply

    @property
    def name(self) -> bytes:
        return self.opening.session

    @property
    def busy(self) -> bool:
        """Whether a round has no reply yet."""
        return bool(self.rounds) or self.sequence.scheduled is not None

    @property
    def own_bytes(self) -> int:
        """What it takes: its tokens, rounds, and events that the device has not read."""
        rounds = sum(round_bytes(round_) for round_, _ in self.rounds)
        events = self.events.size_bytes if self.attached else 0
        return SESSION_BYTES + TOKEN_BYTES * len(self.sequence.tokens) + rounds + events

    @property
    def sampling(self) -> Sampling:
        """Of what follows. The engine's noise begins with each request, so that each has a seed of its own."""
        sampling = self.opening.sampling
        if sampling.temperature == 0:
            return sampling
        return replace(sampling, seed=seed_at(sampling.seed, len(self.sequence.tokens)))

    def check(self, round_: Round) -> None:
        """Raises InvalidInput for a round that cannot be settled exactly."""
        self.sequence.check(round_)
        if round_.score:
            return
        temperature, processors = self.opening.sampling.temperature, self.opening.sampling.processors
        if round_.draft and temperature > 0:
            raise InvalidInput(
                f"a draft at temperature {temperature} cannot be verified: "
                "the engine behind this service samples by itself; use the arm cloud"
            )
        if round_.draft and processors:
            raise InvalidInput(
                f"a draft with {', '.join(processors)} cannot be verified: "
                "the engine behind this service scores texts without; use the arm cloud"
            )

    def next_work(self) -> ScheduledWork | None:
        """Begin the rounds that wait until one has something to be computed. The work of that one."""
        sequence = self.sequence
        while self.rounds and (sequence.scheduled is None or sequence.scheduled.extension):
            sequence.scheduled = None  # a round ends the extension of the one before
            reply = sequence.begin(*self.rounds.popleft())
            if reply is not None:
                self.send(reply)
        return sequence.scheduled

    def spend(self, start: int, tokens: int) -> Processed:
        """Account for tokens that the engine processes, unless its cache of prefixes holds the repeated ones."""
        spent = Processed(tokens, repeated=max(min(self.reached, start + tokens) - start, 0))
        self.processed += spent
        return spent

    def send(self, event: SessionEvent) -> None:
        """Queue an event; a reply says what was computed for it. Without a device it is dropped."""
        if isinstance(event, Committed):
            event, self.processed = replace(event, processed=self.processed), Processed()
        if self.attached:
            self.events.put_nowait(event)

    async def wait_read(self) -> None:
        """Return at once, or, of a device that has left too many events unread, when it has read half of them."""
        if self.events.unread:
            self.readable.clear()
            await self.readable.wait()

    def stop(self) -> None:
        """Compute nothing more; what waits is dropped."""
        self.rounds.clear()
        self.sequence.scheduled = None
        if self.task is not None and self.task is not asyncio.current_task():
            self.task.cancel()
            self.task = None

    def fail(self, error: IsthmusError) -> None:
        """Its rounds end with one error."""
        self.stop()
        self.send(error)
        self.end_if_done()

    def end_if_done(self) -> None:
        """After a half-close None follows the last event."""
        if self.ending and not self.busy:
            self.ending = False
            self.events.put_nowait(None)


def seed_at(seed: int, position: int) -> int:
    """A seed for the noise from `position` on, which differs from that of any other position."""
    digest = hashlib.sha256(f"{seed} {position}".encode()).digest()
    return int.from_bytes(digest[:8], "big") & MAX_SEED
