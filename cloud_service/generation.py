"""Continuous batching of language sessions: one compute thread, passes of one shape, rows of many sessions in each.

Everything here but `_compute` runs on the event loop's thread. While a pass runs, the loop only appends to a session's
rounds and marks sessions as left; all else of a session belongs to the pass.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

from cloud_service.batching import Want, next_pass
from cloud_service.contexts import Contexts
from cloud_service.generation_metrics import GenerationMetrics
from cloud_service.rounds import Text
from models.errors import ContextGone, Draining, InvalidInput, IsthmusError, Overloaded, ServiceError
from models.language.checkpoint import Checkpoint
from models.language.decoder import Decoder, Span, check_rows
from models.language.session import Committed, ModelInfo, Opening, Round
from protos.limits import MAX_ROUNDS
from protos.wire_session import checksum

MAX_SESSIONS = 4096  # texts kept, with or without state: a few kilobytes each
STAY_PASSES = 32  # how long a session at work keeps its state when others want the memory: less would only thrash
IDLE_S = 600.0  # how long a state is kept that no device is connected to

Answer = Committed | IsthmusError


@dataclass(eq=False)
class Session:
    """A text, its rounds in order of arrival, and the queue of whoever is connected to it."""

    name: bytes
    ticket: int
    text: Text
    answers: asyncio.Queue[Answer | None]
    rounds: deque[tuple[Round, float]] = field(default_factory=deque)
    attached: bool = True
    served: int = 0  # number of the pass that last had rows of it
    admitted: int = 0  # number of the pass before which it was given memory
    held: int = 0  # tokens whose state was there when it was opened; said once


class Generation:
    """One language model over sessions within a memory budget."""

    def __init__(self, checkpoint: Checkpoint, decoder: Decoder, budget_bytes: int, metrics: GenerationMetrics) -> None:
        dtype = str(decoder.dtype).removeprefix("torch.")
        config = checkpoint.config
        self.info = ModelInfo(
            checkpoint.fingerprint, checkpoint.name, config.vocab, config.context, f"{dtype}/{decoder.width}"
        )
        self._config, self._eos_ids = config, checkpoint.tokenizer.eos_ids
        self._decoder = decoder
        self._contexts = Contexts(budget_bytes, IDLE_S)
        self._metrics = metrics
        self._sessions: dict[bytes, Session] = {}
        self._tickets = itertools.count()
        self._passes = 0
        self._changed = asyncio.Event()
        self._computing = asyncio.Lock()
        self._draining = False
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="decoder")

    def warm_up(self) -> None:
        """Compile kernels, and prove that answers do not depend on the batch. Raises ServiceError when they do."""
        check_rows(self._decoder)

    async def open(self, opening: Opening, answers: asyncio.Queue[Answer | None]) -> Session:
        """A session with these tokens, its state taken over as far as it is held. What follows goes to `answers`.

        Raises InvalidInput, ContextGone, Overloaded or Draining.
        """
        if self._draining:
            raise Draining("the service is shutting down")
        if opening.session not in self._sessions:
            return self._open(opening, None, answers)
        async with self._computing:  # the state that is taken over may be part of a pass
            return self._open(opening, self._sessions.get(opening.session), answers)

    def _open(self, opening: Opening, former: Session | None, answers: asyncio.Queue[Answer | None]) -> Session:
        tokens = self._tokens(opening, former)
        probe = self._decoder.new_cache()
        if probe.bytes_for(len(tokens) + 1) > self._contexts.budget_bytes:
            raise Overloaded(f"the state of {len(tokens)} tokens does not fit into {self._contexts.budget_bytes} bytes")
        if former is None and len(self._sessions) >= MAX_SESSIONS:
            raise Overloaded(f"{MAX_SESSIONS} sessions are open already")
        text = Text(tokens, opening.sampling, opening.logprobs, self._eos_ids, self._config.context)
        session = Session(opening.session, next(self._tickets), text, answers, served=self._passes)
        if former is not None:
            self._take_over(former, session)
        self._sessions[session.name] = session
        self._record(session)
        return session

    def add(self, session: Session, round_: Round) -> None:
        """Queue a round. Raises InvalidInput for tokens that the model lacks, Overloaded, ContextGone."""
        if self._sessions.get(session.name) is not session:
            raise ContextGone("this session was opened again elsewhere")
        self._check_ids(round_.draft)
        if len(session.rounds) >= MAX_ROUNDS:
            raise Overloaded(f"{MAX_ROUNDS} rounds of this session are waiting already")
        session.rounds.append((round_, time.monotonic()))
        self._changed.set()

    def leave(self, session: Session) -> None:
        """The device has gone; its state stays until the memory is wanted."""
        session.attached = False
        session.rounds.clear()
        if self._sessions.get(session.name) is session:
            self._record(session)
        self._changed.set()

    def drain(self) -> None:
        """Tell every device to go elsewhere, with the tokens it has; `run` returns after the pass at hand."""
        self._draining = True
        for session in self._sessions.values():
            if session.attached:
                session.answers.put_nowait(Draining("the service is shutting down"))
        self._changed.set()

    async def run(self) -> None:
        """Compute passes until drained and idle."""
        while True:
            self._begin_rounds()
            plan = self._plan()
            if plan:
                await self._pass(plan)
            elif self._draining:
                break
            else:
                await self._arrival()
        self._thread.shutdown()

    async def _arrival(self) -> None:
        self._changed.clear()
        try:
            await asyncio.wait_for(self._changed.wait(), IDLE_S / 10)
        except TimeoutError:
            for name in self._contexts.idle(time.monotonic()):
                self._evict(name, "idle")

    def _begin_rounds(self) -> None:
        for session in self._sessions.values():
            if self._draining or not session.attached:
                session.rounds.clear()
                session.text.work = None
            if session.rounds and session.text.work is not None and session.text.work.extension:
                session.text.work = None  # a round ends what the cloud was decoding by itself
            while session.text.work is None and session.rounds:
                at_once = session.text.begin(*session.rounds.popleft())
                if at_once is not None:
                    session.answers.put_nowait(at_once)

    def _plan(self) -> list[tuple[Session, int]]:
        """Rows of the next pass, for sessions that have memory: who is at work keeps it, who waits longest gets it."""
        waiting = [session for session in self._sessions.values() if session.text.work is not None]
        served = [session for session in waiting if self._stays(session)]
        others = [session for session in waiting if session not in served]
        for session in served + sorted(others, key=lambda session: (session.served, session.ticket)):
            if self._make_room(session, keep={other.name for other in served}) and session not in served:
                served.append(session)
        by_ticket = {session.ticket: session for session in served}
        wants = [Want(session.ticket, session.text.rows, session.served) for session in served]
        return [(by_ticket[ticket], rows) for ticket, rows in next_pass(wants, self._decoder.width)]

    def _stays(self, session: Session) -> bool:
        work = session.text.work
        at_work = work is not None and (work.passes > 0 or self._passes - session.admitted < STAY_PASSES)
        return at_work and session.text.cache is not None

    def _make_room(self, session: Session, keep: set[bytes]) -> bool:
        text = session.text
        assert text.work is not None
        cache = text.cache or self._decoder.new_cache()
        size = cache.bytes_for(len(text.tokens) + len(text.work.draft))
        victims = self._contexts.victims(session.name, size, keep)
        if victims is None:
            return False
        for name in victims:
            self._evict(name, "budget")
        if text.cache is None:
            text.cache, session.admitted = cache, self._passes
        self._contexts.record(session.name, max(size, cache.bytes), time.monotonic(), attached=True)
        return True

    async def _pass(self, plan: list[tuple[Session, int]]) -> None:
        started_s = time.monotonic()
        for session, _ in plan:
            assert session.text.work is not None
            session.text.work.started_s = session.text.work.started_s or started_s
        loop = asyncio.get_running_loop()
        try:
            async with self._computing:
                answers = await loop.run_in_executor(self._thread, self._compute, plan)
        except Exception:  # whatever went wrong, every device hears of it and the service lives on
            self._metrics.log_failure("pass failed")
            answers = [ServiceError("the pass failed") for _ in plan]
        self._passes += 1
        now_s = time.monotonic()
        self._metrics.passed(sum(rows for _, rows in plan), self._decoder.width, now_s - started_s)
        for (session, _), answer in zip(plan, answers, strict=True):
            session.served = self._passes
            self._answer(session, answer, now_s)
        self._metrics.contexts(len(self._contexts), self._contexts.held_bytes)

    def _compute(self, plan: list[tuple[Session, int]]) -> list[Answer | None]:
        """One forward pass; what each session's round committed, if it ended."""
        started_s = time.monotonic()
        ids, spans, decides = [], [], False
        for session, rows in plan:
            text = session.text
            assert text.cache is not None
            ids += text.next_ids(rows)
            decides = decides or text.decides(rows)
            spans.append(Span(text.cache, text.cache.length, rows))
        x_NH = self._decoder.forward(self._decoder.embed(ids), spans)
        logits_NV = self._decoder.logits(x_NH).numpy() if decides else None
        seconds = time.monotonic() - started_s
        answers: list[Answer | None] = []
        row = 0
        for session, rows in plan:
            own_NV = None if logits_NV is None else logits_NV[row : row + rows]
            answers.append(session.text.settle(own_NV, rows, seconds))
            row += rows
        return answers

    def _answer(self, session: Session, answer: Answer | None, now_s: float) -> None:
        if answer is None:
            return
        if isinstance(answer, IsthmusError):
            session.text.work, session.text.cache = None, None
            self._contexts.drop(session.name)
        else:
            work = session.text.work
            assert work is not None
            self._metrics.committed(work.matched, len(work.draft), len(answer.tokens))
            session.text.next_extension(now_s)
            answer, session.held = with_held(answer, session.held), 0
        session.answers.put_nowait(answer)

    def _tokens(self, opening: Opening, former: Session | None) -> list[int]:
        """All tokens of the session. Raises InvalidInput, ContextGone."""
        self._check_ids(opening.tokens)
        kept = former.text.tokens[: opening.start] if former is not None else []
        tokens = [*kept, *opening.tokens]
        if len(kept) < opening.start or checksum(tokens) != opening.crc32:
            raise ContextGone(f"the first {opening.start} tokens of this session are not held here")
        if len(tokens) >= self._config.context:
            raise InvalidInput(f"{len(tokens)} tokens leave no room in the model's context of {self._config.context}")
        return tokens

    def _check_ids(self, ids: tuple[int, ...]) -> None:
        if ids and max(ids) >= self._config.vocab:
            raise InvalidInput(f"token {max(ids)} is outside of the model's vocabulary of {self._config.vocab}")

    def _take_over(self, former: Session, session: Session) -> None:
        if former.attached:
            former.answers.put_nowait(ContextGone("this session was opened again elsewhere"))
        former.rounds.clear()
        former.text.work = None
        cache, former.text.cache = former.text.cache, None
        if cache is None:
            return
        same = itertools.takewhile(
            lambda pair: pair[0] == pair[1], zip(former.text.tokens, session.text.tokens, strict=False)
        )
        cache.truncate(min(cache.length, sum(1 for _ in same), len(session.text.tokens) - 1))
        session.text.cache, session.held = cache, cache.length

    def _record(self, session: Session) -> None:
        size = session.text.cache.bytes if session.text.cache else 0
        self._contexts.record(session.name, size, time.monotonic(), attached=session.attached)

    def _evict(self, name: bytes, reason: str) -> None:
        """Forget a session's state, and its text too when no device is connected to it."""
        session = self._sessions[name]
        session.text.cache = None
        self._contexts.drop(name)
        self._metrics.evicted(reason)
        if not session.attached:
            del self._sessions[name]


def with_held(answer: Committed, held: int) -> Committed:
    """The first answer after an opening says how much was held."""
    return replace(answer, held=held) if held else answer
