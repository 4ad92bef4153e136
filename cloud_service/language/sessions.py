"""The sessions of one language model: how one is opened or taken over, who may have memory, what its device is told.

Knows nothing about passes or threads: `generation` calls it between two passes.
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
from isthmus.cloud_service.language.model_runner import AnySequence, FullRunner, SuffixRunner
from isthmus.models.errors import ContextGone, InvalidInput, IsthmusError, Overloaded
from isthmus.models.language.architecture import LlamaConfig
from isthmus.models.language.drafts import shared_length
from isthmus.models.messages import Committed, Opening, Round
from isthmus.protos.wire_session import checksum

MAX_SESSIONS = 4096  # texts kept, with or without state: a few kilobytes each
IDLE_S = 600.0  # how long a state is kept that no device is connected to

SessionEvent = Committed | IsthmusError
EventQueue = asyncio.Queue[SessionEvent | None]


@dataclass(eq=False)
class Session:
    """A text, the layers of its passes, its rounds in order of arrival, the queue of whoever is connected to it."""

    name: bytes
    ticket: int
    layers: FullRunner | SuffixRunner
    text: AnySequence
    answers: EventQueue
    prefill_layers: int = 0  # of the opening: whose state was guessed is of no use to others
    rounds: deque[tuple[Round, float]] = field(default_factory=deque)
    attached: bool = True
    ending: bool = False  # the device has half-closed: None follows the last answer
    served: int = 0  # number of the pass that last had rows of it
    admitted: int = 0  # number of the pass before which it was given memory, then of that which made its state whole
    reading: bool = False  # its state is not whole yet since it was given memory
    held: int = 0  # tokens whose state was there when it was opened; said once

    def tell(self, answer: SessionEvent) -> None:
        """The first answer after an opening says how much was held. A device that has gone hears nothing."""
        if isinstance(answer, Committed) and self.held:
            answer, self.held = replace(answer, held=self.held), 0
        if self.attached:
            self.answers.put_nowait(answer)

    def end(self) -> None:
        """All that was outstanding is answered."""
        self.ending = False
        self.answers.put_nowait(None)


class Sessions:
    """Texts by the name their device chose, and the memory of their states within a budget."""

    def __init__(self, config: LlamaConfig, budget_bytes: int, metrics: EngineMetrics) -> None:
        self._config = config
        self._contexts = KVBudget(budget_bytes, IDLE_S)
        self._metrics = metrics
        self._by_name: dict[bytes, Session] = {}
        self._tickets = itertools.count()

    def __iter__(self) -> Iterator[Session]:
        return iter(self._by_name.values())

    def __contains__(self, session: Session) -> bool:
        """False too for one that was opened again elsewhere."""
        return self._by_name.get(session.name) is session

    def open(self, opening: Opening, layers: FullRunner | SuffixRunner, answers: EventQueue, passes: int) -> Session:
        """A session of these tokens, with its former state. Raises InvalidInput, ContextGone, Overloaded."""
        former = self._by_name.get(opening.session)
        heir = former is not None and (former.layers, former.prefill_layers) == (layers, opening.prefill_layers)
        tokens = self._tokens(opening, former.text.tokens if former is not None and heir else [])
        if layers.empty.bytes_for(len(tokens)) > self._contexts.budget_bytes:
            raise self.too_large(len(tokens))
        if former is None and len(self._by_name) >= MAX_SESSIONS:
            self._forget_stalest()
        text = layers.new_text(tokens, opening)
        session = Session(
            opening.session, next(self._tickets), layers, text, answers, opening.prefill_layers, served=passes
        )
        if former is not None:
            take_over(former, session, heir)
        self._by_name[session.name] = session
        self._record(session)
        return session

    def check_ids(self, ids: Collection[int]) -> None:
        """Raises InvalidInput for tokens that the model lacks."""
        if ids and max(ids) >= self._config.vocab:
            raise InvalidInput(f"token {max(ids)} is outside of the model's vocabulary of {self._config.vocab}")

    def leave(self, session: Session) -> None:
        """The device has gone; the state stays until the memory is wanted. Its size may be growing in a pass."""
        session.attached = False
        session.rounds.clear()
        if session in self:
            self._contexts.detach(session.name, time.monotonic())

    def fits(self, session: Session) -> bool:
        """Whether the state would fit alone."""
        return self._needs(session) <= self._contexts.budget_bytes

    def too_large(self, tokens: int) -> Overloaded:
        budget_bytes = self._contexts.budget_bytes
        return Overloaded(f"the state of {tokens} tokens does not fit into the {budget_bytes} bytes of this service")

    def make_room(self, session: Session, keep: Collection[bytes], passes: int) -> bool:
        """Give memory for the round at hand, if need be that of others but not of those in `keep`."""
        text, size_bytes = session.text, self._needs(session)
        victims = self._contexts.victims(session.name, size_bytes, keep)
        if victims is None:
            return False
        for name in victims:
            self._evict(name, "budget")
        if text.cache is None:
            text.cache, session.admitted, session.reading = session.layers.decoder.new_cache(), passes, True
        size_bytes = max(size_bytes, text.cache.bytes)
        self._contexts.record(session.name, size_bytes, time.monotonic(), attached=session.attached)
        return True

    def forget_state(self, session: Session) -> None:
        """Its cache cannot be trusted any more."""
        session.text.forget()
        self._record(session)

    def lose(self, session: Session) -> None:
        """Its round builds on what is not held (any more): its device is told once, and opens again."""
        assert session.text.work is not None
        session.tell(ContextGone(f"the first {session.text.work.base} tokens of this session are not held here"))
        session.rounds.clear()
        session.text.work = None
        session.text.forget()
        self._contexts.drop(session.name)
        self.measure()
        del self._by_name[session.name]

    def forget_idle(self) -> None:
        for name in self._contexts.idle(time.monotonic()):
            self._evict(name, "idle")

    def measure(self) -> None:
        self._metrics.contexts(len(self._contexts), self._contexts.held_bytes)

    def _tokens(self, opening: Opening, known: list[int]) -> list[int]:
        """All tokens of the session, whose first ones are `known`. Raises InvalidInput, ContextGone."""
        self.check_ids(opening.tokens)
        held = known[: opening.start]
        tokens = [*held, *opening.tokens]
        if len(held) < opening.start or checksum(tokens) != opening.crc32:
            raise ContextGone(f"the first {opening.start} tokens of this session are not held here")
        if len(tokens) >= self._config.context:
            raise InvalidInput(f"{len(tokens)} tokens leave no room in the model's context of {self._config.context}")
        return tokens

    def _needs(self, session: Session) -> int:
        """Bytes of its state when the round at hand has ended."""
        return session.layers.empty.bytes_for(session.text.extent)

    def _record(self, session: Session) -> None:
        size_bytes = session.text.cache.bytes if session.text.cache else 0
        self._contexts.record(session.name, size_bytes, time.monotonic(), attached=session.attached)

    def _forget_stalest(self) -> None:
        name = self._contexts.stalest()
        if name is None:
            raise Overloaded(f"{MAX_SESSIONS} sessions are open already")
        self._evict(name, "budget")

    def _evict(self, name: bytes, reason: str) -> None:
        """Forget a session's state, and its text too when no device is connected to it."""
        session = self._by_name[name]
        session.text.forget()
        self._contexts.drop(name)
        self._metrics.evicted(reason)
        self.measure()
        if not session.attached:
            del self._by_name[name]


def take_over(former: Session, session: Session, heir: bool) -> None:
    """Give `session`, if it is an heir, the state of the tokens that both share; who is at the former one is told."""
    former.tell(ContextGone("this session was opened again elsewhere"))
    if former.ending:
        former.end()
    cache, former.text.cache = former.text.cache, None
    if cache is None or not heir:
        return
    same = shared_length(former.text.tokens, session.text.tokens)
    cache.truncate(min(cache.length, same, session.text.reusable))
    session.text.cache, session.held = cache, cache.length
