"""The sessions of one language model: opening, reuse of KV caches, memory within a budget, events to devices.

Knows nothing about steps or threads: the engine calls it between two steps.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import deque
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace

from isthmus.cloud_service.language.kv_budget import KVBudget
from isthmus.cloud_service.language.metrics import EngineMetrics
from isthmus.cloud_service.language.model_runner import AnySequence, FullRunner, PrefixRunner, SuffixRunner
from isthmus.cloud_service.language.scheduler import Candidate, Grant, MemoryRequest
from isthmus.models.errors import ContextGone, InvalidInput, IsthmusError, Overloaded
from isthmus.models.language.architecture import LlamaConfig
from isthmus.models.language.drafts import shared_length
from isthmus.models.messages import Committed, Opening, Round
from isthmus.protos.wire_session import checksum

MAX_SESSIONS = 4096  # sequences kept, with or without a cache: a few kilobytes each
IDLE_S = 600.0  # how long a cache is kept that no device is connected to

SessionEvent = Committed | IsthmusError
EventQueue = asyncio.Queue[SessionEvent | None]


@dataclass(eq=False)
class Session:
    """A sequence, the runner of its steps, its rounds in order of arrival, the queue of the connected device."""

    name: bytes
    ticket: int
    runner: FullRunner | SuffixRunner
    sequence: AnySequence
    events: EventQueue
    prefill_layers: int = 0  # of the opening: an approximate cache is of no use to an exact session
    rounds: deque[tuple[Round, float]] = field(default_factory=deque)
    attached: bool = True
    ending: bool = False  # the device has half-closed: None follows the last event
    last_step: int = 0  # that computed tokens of it
    first_step: int = 0  # before which it was granted memory, then the one that completed its cache
    prefilling: bool = False  # its cache is not complete yet since it was granted memory
    held: int = 0  # tokens whose cache was held when the session was opened; reported once

    @property
    def next_runner(self) -> FullRunner | PrefixRunner | SuffixRunner:
        """The runner of its next tokens."""
        return self.runner.next_runner(self.sequence)

    @property
    def needs_bytes(self) -> int:
        """Size of its cache when the scheduled round has ended."""
        return self.runner.empty_cache.bytes_for(self.sequence.final_length)

    def memory_request(self) -> MemoryRequest | None:
        """What the scheduler needs to know to grant memory; None without a scheduled round."""
        sequence = self.sequence
        if sequence.scheduled is None:
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
        )

    def candidate(self) -> Candidate:
        """What the scheduler needs to know to plan a step."""
        return Candidate(self.ticket, self.sequence.pending_tokens, self.last_step, self.next_runner)

    def send(self, event: SessionEvent) -> None:
        """Queue an event. The first reply after an opening says how much was held. Without a device it is dropped."""
        if isinstance(event, Committed) and self.held:
            event, self.held = replace(event, held=self.held), 0
        if self.attached:
            self.events.put_nowait(event)

    def end(self) -> None:
        """All outstanding rounds are answered."""
        self.ending = False
        self.events.put_nowait(None)


class Sessions:
    """Sessions by the name that their device chose, and the memory of their caches within a budget."""

    def __init__(self, config: LlamaConfig, budget_bytes: int, metrics: EngineMetrics) -> None:
        self.budget = KVBudget(budget_bytes, IDLE_S)
        self._config = config
        self._metrics = metrics
        self._by_name: dict[bytes, Session] = {}
        self._tickets = itertools.count()

    def __iter__(self) -> Iterator[Session]:
        return iter(self._by_name.values())

    def __contains__(self, session: Session) -> bool:
        """False also for a session that was opened again by another stream."""
        return self._by_name.get(session.name) is session

    def open(self, opening: Opening, runner: FullRunner | SuffixRunner, events: EventQueue, step: int) -> Session:
        """A session of these tokens, with its former cache. Raises InvalidInput, ContextGone, Overloaded."""
        former = self._by_name.get(opening.session)
        key = (runner, opening.prefill_layers)
        compatible = former is not None and (former.runner, former.prefill_layers) == key
        tokens = self._tokens(opening, former.sequence.tokens if former is not None and compatible else [])
        if runner.empty_cache.bytes_for(len(tokens)) > self.budget.budget_bytes:
            raise self.too_large(len(tokens))
        if former is None and len(self._by_name) >= MAX_SESSIONS:
            self._forget_stalest()
        sequence, ticket = runner.new_sequence(tokens, opening), next(self._tickets)
        session = Session(opening.session, ticket, runner, sequence, events, opening.prefill_layers, last_step=step)
        if former is not None:
            replace_session(former, session, compatible)
        self._by_name[session.name] = session
        self._record(session)
        return session

    def check_ids(self, ids: Collection[int]) -> None:
        """Raises InvalidInput for tokens that the model lacks."""
        if ids and max(ids) >= self._config.vocab:
            raise InvalidInput(f"token {max(ids)} is outside of the model's vocabulary of {self._config.vocab}")

    def leave(self, session: Session) -> None:
        """The device has disconnected; its cache stays until the memory is needed. A step may be extending it now."""
        session.attached = False
        session.rounds.clear()
        if session in self:
            self.budget.detach(session.name, time.monotonic())

    def fits(self, session: Session) -> bool:
        """Whether its cache would fit alone."""
        return session.needs_bytes <= self.budget.budget_bytes

    def too_large(self, tokens: int) -> Overloaded:
        """The error for a cache that does not fit even alone."""
        budget_bytes = self.budget.budget_bytes
        return Overloaded(f"the state of {tokens} tokens does not fit into the {budget_bytes} bytes of this service")

    def carry_out(self, grant: Grant, step: int) -> Session:
        """Evict, and give memory for the scheduled round."""
        for name in grant.evicted:
            self._evict(name, "budget")
        session = self._by_name[grant.session]
        sequence, size_bytes = session.sequence, session.needs_bytes
        if sequence.cache is None:
            sequence.cache, session.first_step, session.prefilling = session.runner.decoder.new_cache(), step, True
        size_bytes = max(size_bytes, sequence.cache.bytes)
        self.budget.record(session.name, size_bytes, time.monotonic(), attached=session.attached)
        return session

    def drop_cache(self, session: Session) -> None:
        """Its cache cannot be trusted any more."""
        session.sequence.drop_cache()
        self._record(session)

    def drop_lost(self, session: Session) -> None:
        """Its round builds on what is not held (any more): its device gets one error, and opens again."""
        assert session.sequence.scheduled is not None
        base = session.sequence.scheduled.base
        session.send(ContextGone(f"the first {base} tokens of this session are not held here"))
        session.rounds.clear()
        session.sequence.scheduled = None
        session.sequence.drop_cache()
        self.budget.drop(session.name)
        self.report()
        del self._by_name[session.name]

    def forget_idle(self) -> None:
        """Evict what no device has been connected to for IDLE_S."""
        for name in self.budget.idle(time.monotonic()):
            self._evict(name, "idle")

    def report(self) -> None:
        """Update the metrics."""
        self._metrics.caches(len(self.budget), self.budget.held_bytes)

    def _tokens(self, opening: Opening, known: list[int]) -> list[int]:
        """All tokens of the session, which begin with some of `known`. Raises InvalidInput, ContextGone."""
        self.check_ids(opening.tokens)
        held = known[: opening.start]
        tokens = [*held, *opening.tokens]
        if len(held) < opening.start or checksum(tokens) != opening.crc32:
            raise ContextGone(f"the first {opening.start} tokens of this session are not held here")
        if len(tokens) >= self._config.context:
            raise InvalidInput(f"{len(tokens)} tokens leave no room in the model's context of {self._config.context}")
        return tokens

    def _record(self, session: Session) -> None:
        size_bytes = session.sequence.cache.bytes if session.sequence.cache else 0
        self.budget.record(session.name, size_bytes, time.monotonic(), attached=session.attached)

    def _forget_stalest(self) -> None:
        name = self.budget.stalest()
        if name is None:
            raise Overloaded(f"{MAX_SESSIONS} sessions are open already")
        self._evict(name, "budget")

    def _evict(self, name: bytes, reason: str) -> None:
        """Drop a session's cache, and the session too when no device is connected to it."""
        session = self._by_name[name]
        session.sequence.drop_cache()
        self.budget.drop(name)
        self._metrics.evicted(reason)
        self.report()
        if not session.attached:
            del self._by_name[name]


def replace_session(former: Session, session: Session, compatible: bool) -> None:
    """End `former` with an error; `session`, if compatible, reuses the cache of the tokens that both share."""
    former.send(ContextGone("this session was opened again elsewhere"))
    if former.ending:
        former.end()
    cache, former.sequence.cache = former.sequence.cache, None
    if cache is not None and compatible:
        shared = shared_length(former.sequence.tokens, session.sequence.tokens)
        cache.truncate(min(cache.length, shared, session.sequence.reusable_length))
        session.sequence.cache, session.held = cache, cache.length
