"""The sessions of one language model: opening, reuse of KV caches, memory within a budget, events to devices.

Knows nothing about steps or threads: the engine calls it between two steps.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Collection
from dataclasses import dataclass

from isthmus.cloud_service.byte_budget import ByteBudget
from isthmus.cloud_service.language.kv_budget import KVBudget
from isthmus.cloud_service.language.metrics import EngineMetrics
from isthmus.cloud_service.language.model_runner import FullRunner, SuffixRunner
from isthmus.cloud_service.language.opened import check_ids, opened_tokens
from isthmus.cloud_service.language.prefixes import Prefixes
from isthmus.cloud_service.language.scheduler import Grant
from isthmus.cloud_service.language.session import EventQueue, Session
from isthmus.cloud_service.language.session_table import SessionTable
from isthmus.models.errors import ContextGone, Overloaded
from isthmus.models.language.architecture import LlamaConfig
from isthmus.models.language.drafts import shared_length
from isthmus.models.language.processors import TokenChooser
from isthmus.models.messages import Opening

MAX_SESSIONS = 4096  # with or without a cache
MAX_PEER_SESSIONS = 256  # of one connection, which is one device or gateway
IDLE_S = 600.0  # how long a cache is kept that no device is connected to


@dataclass(frozen=True, slots=True)
class CheckedOpening:
    """An opening, all tokens of its session, and how many of them its `former` session of this name shares."""

    opening: Opening
    tokens: list[int]
    runner: FullRunner | SuffixRunner
    former: Session | None
    shared: int | None  # None: the cache of the former session is of no use


class Sessions(SessionTable[Session]):
    """Sessions by the name that their device chose; their caches within a budget, what else they take within another.

    `served`: the last step that computed tokens of a peer.
    """

    def __init__(
        self,
        config: LlamaConfig,
        budget_bytes: int,
        queue: ByteBudget,
        metrics: EngineMetrics,
        *,
        isolated: bool = False,
    ) -> None:
        """`isolated`: peers do not copy the state of a common beginning from each other."""
        self.budget = KVBudget(budget_bytes, IDLE_S)
        self.served: dict[str, int] = {}
        super().__init__(queue)
        self._config = config
        self._metrics = metrics
        self._tickets = itertools.count()
        self._prefixes, self._isolated = Prefixes(), isolated

    @property
    def attached(self) -> list[Session]:
        """Those that a device is connected to."""
        return [session for session in self if session.attached]

    def check(self, opening: Opening, runner: FullRunner | SuffixRunner) -> CheckedOpening:
        """Changes nothing, so that any thread may call it between two steps.

        Raises InvalidInput, ContextGone, or Overloaded for a session that does not fit even alone.
        """
        former = self._by_name.get(opening.session)
        compatible = former is not None and former.cache_kind == (runner, opening.prefill_layers)
        known = former.sequence.tokens if former is not None and compatible else []
        tokens = opened_tokens(opening, known, self._config.vocab, self._config.context)
        if runner.empty_cache.bytes_for(len(tokens)) > self.budget.budget_bytes:
            raise self.too_large(len(tokens))
        return CheckedOpening(opening, tokens, runner, former, shared_length(known, tokens) if compatible else None)

    def open(self, checked: CheckedOpening, chooser: TokenChooser, events: EventQueue, peer: str, step: int) -> Session:
        """A session of these tokens, with its former cache. Raises InvalidInput or Overloaded."""
        opening, former = checked.opening, checked.former
        sequence = checked.runner.new_sequence(checked.tokens, opening, chooser)
        session = Session(
            name=opening.session,
            ticket=next(self._tickets),
            runner=checked.runner,
            sequence=sequence,
            events=events,
            peer=peer,
            prefill_layers=opening.prefill_layers,
            last_step=step,
        )
        self._make_room(session, former)
        if former is not None:
            replace_session(former, session, checked.shared)
            self._remove(former)
        self._by_name[session.name] = session
        self._of_peer[peer] += 1
        self.record_prefix(session)
        self._record(session)
        self.report()
        return session

    def check_ids(self, ids: Collection[int]) -> None:
        """Raises InvalidInput for tokens that the model lacks."""
        check_ids(ids, self._config.vocab)

    def leave(self, session: Session) -> None:
        """The device has disconnected; its cache stays until the memory is needed. A step may be extending it now."""
        session.attached = False
        session.rounds.clear()
        if session in self:
            self.budget.detach(session.name, time.monotonic())
            self.settle(session)

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
            self._copy_prefix(session)
        size_bytes = max(size_bytes, sequence.cache.bytes)
        self.budget.record(session.name, size_bytes, time.monotonic(), attached=session.attached)
        return session

    def record_prefix(self, session: Session) -> None:
        """Its tokens have more state than before, which others may copy."""
        if session in self and session.exact:
            held = session.sequence.cache.length if session.sequence.cache else 0
            tokens = session.sequence.tokens
            self._prefixes.record(session.name, self._scope(session), tokens, min(held, len(tokens)))

    def drop_cache(self, session: Session) -> None:
        """Its cache cannot be trusted any more."""
        self._prefixes.drop(session.name)
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
        self._remove(session)
        self.report()

    def keep_within(self, peer: str, limit_bytes: int) -> bool:
        """Evict sessions of a peer without a device, the stalest first, until all of its own need at most so much."""
        while sum(session.needs_bytes for session in self if session.peer == peer) > limit_bytes:
            if not self._forget_stalest([session.name for session in self if session.peer == peer]):
                return False
        return True

    def forget_idle(self) -> None:
        """Evict what no device has been connected to for IDLE_S."""
        for name in self.budget.idle(time.monotonic()):
            self._evict(name, "idle")

    def report(self) -> None:
        """Update the metrics."""
        self._metrics.caches(len(self.budget), self.budget.held_bytes)

    def _scope(self, session: Session) -> str:
        return f"peer {session.peer}" if self._isolated else "everyone"

    def _copy_prefix(self, session: Session) -> None:
        """Copy the state of the longest beginning that another session holds: bit for bit what it would compute."""
        tokens, cache = session.sequence.tokens, session.sequence.cache
        if cache is None or not session.exact:
            return
        for name, stop in self._prefixes.find(self._scope(session), tokens[: session.sequence.reusable_length]):
            other = self._by_name[name].sequence
            if other.cache is not None and other.cache.length >= stop and other.tokens[:stop] == tokens[:stop]:
                cache.copy(other.cache, stop)
                session.held = 0 if session.answered else stop
                self._metrics.shared(stop)
                self.record_prefix(session)
                return

    def _record(self, session: Session) -> None:
        size_bytes = session.sequence.cache.bytes if session.sequence.cache else 0
        self.budget.record(session.name, size_bytes, time.monotonic(), attached=session.attached)

    def _make_room(self, session: Session, former: Session | None) -> None:
        """Count a new session; the stalest ones without a device go where they are too many. Raises Overloaded."""
        if (former is None or former.peer != session.peer) and self._of_peer[session.peer] >= MAX_PEER_SESSIONS:
            own = [each.name for each in self if each.peer == session.peer]
            if not self._forget_stalest(own):
                raise Overloaded(f"{MAX_PEER_SESSIONS} sessions of this connection are open already")
        if former is None and len(self._by_name) >= MAX_SESSIONS and not self._forget_stalest(self._by_name):
            raise Overloaded(f"{MAX_SESSIONS} sessions are open already")
        while True:
            try:
                self._queue.take(session.own_bytes)
            except Overloaded:
                if not self._forget_stalest(self._by_name.keys() - {session.name}):
                    raise
            else:
                session.counted_bytes = session.own_bytes
                return

    def _forget_stalest(self, names: Collection[bytes]) -> bool:
        """Of these the session without a device that is longest unused; False where each has one."""
        name = self.budget.stalest(names)
        if name is not None:
            self._evict(name, "budget")
        return name is not None

    def _evict(self, name: bytes, reason: str) -> None:
        """Drop a session's cache, and the session too when no device is connected to it."""
        session = self._by_name[name]
        self._prefixes.drop(name)
        session.sequence.drop_cache()
        self.budget.drop(name)
        self._metrics.evicted(reason)
        if not session.attached:
            self._remove(session)
        self.report()

    def _remove(self, session: Session) -> None:
        """It is held no more: by its name another may be opened."""
        self._prefixes.drop(session.name)
        del self._by_name[session.name]
        self.settle(session)
        self._of_peer[session.peer] -= 1
        if not self._of_peer[session.peer]:
            del self._of_peer[session.peer]
            self.served.pop(session.peer, None)


def replace_session(former: Session, session: Session, shared: int | None) -> None:
    """End `former` with an error; `session` reuses the cache of the `shared` first tokens, unless that is None."""
    former.send(ContextGone("this session was opened again elsewhere"))
    if former.ending:
        former.end()
    session.processed = former.processed
    session.reached = min(former.reached, shared or 0)
    cache, former.sequence.cache = former.sequence.cache, None
    if cache is not None and shared is not None:
        cache.truncate(min(cache.length, shared, session.sequence.reusable_length))
        session.sequence.cache, session.held, session.admitted = cache, cache.length, cache.length > 0
