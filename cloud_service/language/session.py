"""One session in the cloud: its sequence, its rounds in order of arrival, and the events for the connected device.

Knows nothing about other sessions, steps or threads.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from isthmus.cloud_service.language.model_runner import AnySequence, Extent, FullRunner, PrefixRunner, SuffixRunner
from isthmus.cloud_service.language.scheduler import PROTECTED_STEPS, Candidate, MemoryRequest, RestingCache
from isthmus.cloud_service.language.sequence import TokenSequence
from isthmus.models.errors import IsthmusError
from isthmus.models.messages import Committed, Processed, Round
from isthmus.protos.limits import MAX_STREAM_INFLIGHT

SESSION_BYTES = 4096  # of a session's own objects
TOKEN_BYTES = 40  # a Python int and its place in a list
ROUND_BYTES = 512  # of a round without tokens and states
EVENT_BYTES = 512  # of an event without tokens and log-probabilities
LOGPROB_BYTES = 160  # a pair of Python numbers and its place in a tuple
AGED_STEPS = 256  # that a sequence waits for memory until others overtake it no more: some seconds
MAX_UNREAD = MAX_STREAM_INFLIGHT  # events that a device has not read; above this its sequence pauses

SessionEvent = Committed | IsthmusError


class EventQueue(asyncio.Queue[SessionEvent | None]):
    """Events to one device; None follows the last one. `on_read` is called after each that is taken."""

    def __init__(self) -> None:
        super().__init__()
        self.size_bytes = 0
        self.on_read: Callable[[], None] = lambda: None

    @property
    def unread(self) -> bool:
        """Whether the device has left so many events unread that its sequence pauses."""
        return self.qsize() >= MAX_UNREAD

    def _put(self, item: SessionEvent | None) -> None:
        super()._put(item)
        self.size_bytes += event_bytes(item)

    def _get(self) -> SessionEvent | None:
        item = super()._get()
        self.size_bytes -= event_bytes(item)
        self.on_read()
        return item


@dataclass(eq=False)
class Session:
    """A sequence, the runner of its steps, its rounds in order of arrival, the queue of the connected device."""

    name: bytes
    ticket: int
    runner: FullRunner | SuffixRunner
    sequence: AnySequence
    events: EventQueue
    peer: str
    prefill_layers: int = 0  # of the opening: an approximate cache is of no use to an exact session
    rounds: deque[tuple[Round, float]] = field(default_factory=deque)
    attached: bool = True
    ending: bool = False  # the device has half-closed: None follows the last event
    admitted: bool = False  # its first round after the opening was not refused for load
    answered: bool = False  # that round has ended
    last_step: int = 0  # that computed tokens of it
    first_step: int = 0  # before which it was granted memory, then the one that completed its cache
    prefilling: bool = False  # its cache is not complete yet since it was granted memory
    held: int = 0  # tokens whose cache was held when the session was opened; reported once
    counted_bytes: int = 0  # of `own_bytes`, as counted last
    reached: int = 0  # of its tokens, the first, that were processed for it, whether they are still held or not
    processed: Processed = field(default_factory=Processed)  # since the last reply

    @property
    def next_runner(self) -> FullRunner | PrefixRunner | SuffixRunner:
        """The runner of its next tokens."""
        return self.runner.next_runner(self.sequence)

    @property
    def cache_kind(self) -> tuple[FullRunner | SuffixRunner, int]:
        """Sessions of equal kind can reuse each other's cache."""
        return self.runner, self.prefill_layers

    @property
    def exact(self) -> bool:
        """Whether its state depends on its tokens alone: not on what a device has sent, nor on the prompt's length."""
        return isinstance(self.sequence, TokenSequence) and not self.prefill_layers

    @property
    def busy(self) -> bool:
        """Whether a round has no reply yet."""
        return bool(self.rounds) or self.sequence.scheduled is not None

    @property
    def needs_bytes(self) -> int:
        """Size of its cache when the scheduled round has ended."""
        return self.runner.empty_cache.bytes_for(self.sequence.final_length)

    @property
    def own_bytes(self) -> int:
        """What it takes beside its cache: tokens, state of its grammar, rounds, and events that were not read."""
        rounds = sum(round_bytes(round_) for round_, _ in self.rounds)
        if (work := self.sequence.scheduled) is not None:
            rounds += round_bytes(Round(work.base, work.draft, states=work.states))
        events = self.events.size_bytes if self.attached else 0
        held = SESSION_BYTES + TOKEN_BYTES * len(self.sequence.tokens) + self.sequence.state_bytes
        return held + rounds + events

    @property
    def backlog(self) -> int:
        """Tokens that its scheduled round needs computed; 0 without one."""
        if self.sequence.scheduled is None:
            return 0
        return max(self.sequence.final_length - (self.sequence.cache.length if self.sequence.cache else 0), 1)

    @property
    def awaits_first_token(self) -> bool:
        """Whether its first round after the opening has had no step yet."""
        return self.sequence.scheduled is not None and not self.sequence.scheduled.steps and not self.answered

    def waited_s(self, now_s: float) -> float:
        """How long its scheduled round has waited."""
        return now_s - self.sequence.scheduled.arrived_s if self.sequence.scheduled else 0.0

    def memory_request(self, step: int) -> MemoryRequest | None:
        """What the scheduler needs to know to grant memory; None without a scheduled round, or while it pauses."""
        sequence = self.sequence
        if sequence.scheduled is None or self.events.unread:
            return None
        return MemoryRequest(
            session=self.name,
            ticket=self.ticket,
            needs_bytes=self.needs_bytes,
            cache_bytes=None if sequence.cache is None else sequence.cache.bytes,
            round_steps=sequence.scheduled.steps,
            first_step=self.first_step,
            last_step=self.last_step,
            restartable=sequence.restartable,
            peer=self.peer,
            prompt=not self.answered and self.backlog > self.runner.decoder.width,
            aged=step - self.last_step >= AGED_STEPS,
        )

    def resting_cache(self, step: int) -> RestingCache | None:
        """Its cache between two rounds; None without one, without a device, or when it was used too long ago."""
        cache = self.sequence.cache
        resting = self.attached and self.sequence.scheduled is None and step - self.last_step <= PROTECTED_STEPS
        return RestingCache(self.name, self.peer, cache.bytes) if resting and cache is not None else None

    def candidate(self) -> Candidate:
        """What the scheduler needs to know to plan a step."""
        return Candidate(self.ticket, self.sequence.pending_tokens, self.last_step, self.next_runner, self.peer)

    def spend(self, extent: Extent) -> Processed:
        """Account for what a step has computed of it."""
        stop, cache = extent.start + extent.tokens, self.sequence.cache
        repeated = max(min(self.reached, stop) - extent.start, 0)
        self.reached = max(self.reached, min(len(self.sequence.tokens), cache.length if cache else 0))
        spent = Processed(extent.tokens, extent.flops, repeated)
        self.processed += spent
        return spent

    def send(self, event: SessionEvent) -> None:
        """Queue an event. A reply says what was computed for it, the first after an opening how much was held.

        Without a device it is dropped.
        """
        if isinstance(event, Committed):
            event = replace(event, held=self.held, processed=self.processed)
            self.held, self.processed = 0, Processed()
        if self.attached:
            self.events.put_nowait(event)

    def end(self) -> None:
        """All outstanding rounds are answered."""
        self.ending = False
        self.events.put_nowait(None)


def round_bytes(round_: Round) -> int:
    """Memory that a waiting round takes."""
    return ROUND_BYTES + TOKEN_BYTES * len(round_.draft) + sum(map(len, round_.states))


def event_bytes(event: SessionEvent | None) -> int:
    """Memory that an event takes."""
    if not isinstance(event, Committed):
        return EVENT_BYTES
    return (
        EVENT_BYTES + TOKEN_BYTES * len(event.tokens) + LOGPROB_BYTES * sum(len(row.top) + 1 for row in event.logprobs)
    )
