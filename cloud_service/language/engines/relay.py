"""Sessions over an engine without any: rounds are settled on the choices that it streams or scores.

    round without a draft ── stream ──> the next token, and its extension, until another round comes
    round with a draft    ── score ───> the choices of its positions: confirmed up to the first that differs

A lost engine loses no token: each is with its device, which opens the session again, here or at another replica. When
the engine can be used is the business of `watch`. Everything is on the event loop's thread.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import aclosing
from functools import partial

from isthmus.cloud_service.byte_budget import ByteBudget
from isthmus.cloud_service.language.engines.metrics import RequestMetrics
from isthmus.cloud_service.language.engines.places import Places
from isthmus.cloud_service.language.engines.protocol import Choice, Engine
from isthmus.cloud_service.language.engines.relay_session import RelaySession
from isthmus.cloud_service.language.engines.relay_table import RelayTable
from isthmus.cloud_service.language.engines.watch import Watch
from isthmus.cloud_service.language.opened import check_ids, opened_tokens
from isthmus.cloud_service.language.rounds import CommittedTokens, ScheduledWork
from isthmus.cloud_service.language.session import MAX_UNREAD, EventQueue
from isthmus.models.errors import (
    ContextGone,
    Draining,
    EngineDown,
    EngineFault,
    InvalidInput,
    IsthmusError,
    Overloaded,
    ServiceError,
    UnknownBundle,
)
from isthmus.models.language.checkpoint.tokenizer import Tokenizer
from isthmus.models.language.drafts import shared_length
from isthmus.models.messages import ModelInfo, Opening, Round
from isthmus.protos.limits import MAX_ROUNDS


class RelayHost:
    """The sessions of the one model that an engine holds."""

    def __init__(
        self, engine: Engine, watch: Watch, metrics: RequestMetrics, *, queue: ByteBudget, requests: int, wait_s: float
    ) -> None:
        """At most `requests` at the engine at once; who would wait longer than `wait_s` for that is refused."""
        self._engine, self._watch, self._metrics = engine, watch, metrics
        self._sessions = RelayTable(queue)
        self._places = Places(requests, wait_s)
        self._draining = asyncio.Event()
        watch.on_lost = lambda problem: self._fail_all(EngineDown(problem))

    @property
    def info(self) -> ModelInfo | None:
        """None while the engine cannot be used."""
        return self._watch.info

    @property
    def described(self) -> str:
        """In words, for the log."""
        return self._watch.described

    @property
    def tokenizer(self) -> Tokenizer:
        return self._watch.tokenizer

    @property
    def problem(self) -> str:
        """Why the engine cannot be used; empty while it can."""
        return self._watch.problem

    async def open(self, opening: Opening, events: EventQueue, peer: str = "") -> RelaySession:
        """A session with these tokens. What follows goes to `events`.

        Raises InvalidInput, UnknownBundle, ContextGone, EngineDown, Overloaded or Draining.
        """
        info = self._usable()
        if opening.handoff or opening.prefill_layers:
            raise UnknownBundle("the engine behind this service takes tokens, and no hidden states")
        if opening.logprobs is not None and not self._watch.logprobs:
            raise InvalidInput("the engine behind this service gives no log-probabilities")
        if unknown := [name for name in opening.sampling.processors if name not in info.processors]:
            raise InvalidInput(f"the engine behind this service cannot apply {', '.join(unknown)}")
        former = self._sessions.get(opening.session)
        known = former.sequence.tokens if former is not None else []
        tokens = opened_tokens(opening, known, info.vocab, info.context)
        session = RelaySession(
            opening, CommittedTokens(tokens, info.end_ids, info.context, opening.logprobs), events, peer
        )
        self._sessions.admit(session)
        if former is not None:
            session.reached = min(former.reached, shared_length(known, tokens))
            former.fail(ContextGone("this session was opened again elsewhere"))
        events.on_read = partial(self._read, session)
        return session

    def add(self, session: RelaySession, round_: Round) -> None:
        """Queue a round. Raises InvalidInput, EngineDown, Overloaded, Draining.

        A round of a session that was opened again elsewhere is dropped: its device has got an error for it.
        """
        info = self._usable()
        if session not in self._sessions:
            return
        check_ids(round_.draft, info.vocab)
        session.check(round_)
        if round_.score and not info.scores:
            raise InvalidInput("the engine behind this service gives no log-probabilities of a text")
        if round_.draft and not round_.score and "verify" not in info.arms:
            raise InvalidInput("the engine behind this service cannot verify drafts: use the arm cloud")
        if len(session.rounds) >= MAX_ROUNDS:
            raise Overloaded(f"{MAX_ROUNDS} rounds of this session are waiting already")
        self._sessions.queue_round(session, round_)
        if session.task is None:
            session.task = asyncio.create_task(self._settle_all(session))

    async def keep_within(self, peer: str, limit_bytes: int) -> bool:
        """Its sessions hold no KV caches: the engine does."""
        return True

    def end(self, session: RelaySession) -> None:
        """The device sends no more rounds: None follows the events of those that are outstanding."""
        session.ending = True
        session.end_if_done()

    def leave(self, session: RelaySession) -> None:
        """The device has disconnected; its request at the engine ends, its tokens stay for a while."""
        session.attached = False
        session.stop()
        session.events.on_read = lambda: None
        self._sessions.rest(session)

    def drain(self) -> None:
        """Send Draining to every device, which keeps its tokens; `run` returns."""
        self._draining.set()
        for session in self._sessions:
            session.fail(Draining("the service is shutting down"))

    async def run(self) -> None:
        """Watch the engine until drained."""
        watching = asyncio.create_task(self._watch.run())
        draining = asyncio.create_task(self._draining.wait())
        try:
            await asyncio.wait([watching, draining], return_when=asyncio.FIRST_COMPLETED)
            if watching.done():
                watching.result()
        finally:
            watching.cancel()
            draining.cancel()
            await self._engine.close()

    def _usable(self) -> ModelInfo:
        if self._draining.is_set():
            raise Draining("the service is shutting down")
        if self._watch.info is None:
            raise EngineDown(self._watch.problem)
        return self._watch.info

    def _fail_all(self, error: IsthmusError) -> None:
        """Every session with a round outstanding gets the error; the others find out with their next round."""
        for session in list(self._sessions):
            if session.busy:
                session.fail(error)

    def _read(self, session: RelaySession) -> None:
        """The device has read an event."""
        self._sessions.settle(session)
        if session.events.qsize() == MAX_UNREAD // 2:
            session.readable.set()

    async def _settle_all(self, session: RelaySession) -> None:
        """Settle a session's rounds until none is left. Whatever fails, its device gets an error."""
        try:
            while (work := session.next_work()) is not None:
                await session.wait_read()  # without a place at the engine, which others could have
                await self._at_the_engine(session, work)
        except IsthmusError as error:
            self._note(error)
            session.fail(error)
        except Exception:  # a fault of the service
            self._metrics.log_failure("settling a round failed")
            session.fail(ServiceError("the round failed"))
        finally:
            if session.task is asyncio.current_task():
                session.task = None
        session.end_if_done()

    def _note(self, error: IsthmusError) -> None:
        if isinstance(error, EngineDown):
            self._watch.suspect()
        elif isinstance(error, EngineFault):
            self._metrics.log_fault(str(error))

    async def _at_the_engine(self, session: RelaySession, work: ScheduledWork) -> None:
        with self._metrics.waiting():
            await self._places.take(session.peer)
        try:
            with self._metrics.running():
                work.started_s = time.monotonic()
                await (self._score(session, work) if work.draft else self._stream(session, work))
        finally:
            self._places.free(session.peer)

    async def _score(self, session: RelaySession, work: ScheduledWork) -> None:
        tokens, started_s = session.sequence.tokens, time.monotonic()
        self._metrics.processed(session.spend(0, len(tokens) + len(work.draft)))
        ids, top = [*tokens, *work.draft], session.opening.logprobs
        if work.score:
            rows = await self._engine.prompt_logprobs(ids, len(tokens), top or 0)
            choices = [Choice(id_, row) for id_, row in zip(work.draft, rows, strict=True)]
        else:
            choices = await self._engine.score(ids, len(tokens), top)
        work.compute_s = time.monotonic() - started_s
        for choice in choices:
            if self._commit(session, work, choice):
                return

    async def _stream(self, session: RelaySession, work: ScheduledWork) -> None:
        """Tokens until the round and its extension end, another round comes, or the device does not read them.

        What depends on the answer's tokens is asked for once: an engine counts them from the beginning of a request.
        Raises InvalidInput where an answer has begun before.
        """
        sequence, last_s = session.sequence, time.monotonic()
        whole = session.sampling.reads_answer
        if whole and len(sequence.tokens) != session.opening.answer_start:
            raise InvalidInput("the engine behind this service cannot go on with a grammar or penalties: ask again")
        start, fresh = 0, len(sequence.tokens)  # that the engine processes for the next choice
        limit = min(1 + work.extend, sequence.room)
        choices = self._engine.stream(tuple(sequence.tokens), session.sampling, limit, session.opening.logprobs)
        async with aclosing(choices):
            async for choice in choices:
                now_s = time.monotonic()
                self._metrics.processed(session.spend(start, fresh))
                start, fresh = start + fresh, 1
                if (current := sequence.scheduled) is None:
                    return  # more than what was asked for
                current.started_s = current.started_s or last_s
                current.compute_s, last_s = now_s - last_s, now_s
                self._commit(session, current, choice)
                if whole:
                    await session.wait_read()
                elif session.rounds or session.events.unread:
                    return

    def _commit(self, session: RelaySession, work: ScheduledWork, choice: Choice) -> bool:
        """Settle one position. Whether that ended the round, whose reply is sent. Raises Overloaded."""
        work.steps = 1
        if choice.logprobs is not None:
            work.logprobs.append(choice.logprobs)
        committed = session.sequence.settle(choice.token)
        if committed is None:
            return False
        session.reached = len(session.sequence.tokens) - 1
        if not work.score:
            self._metrics.committed(work.matched + min(len(committed.tokens), 1))
        session.sequence.next_extension(time.monotonic())
        session.send(committed)
        self._sessions.settle(session, grow=True)
        return True
