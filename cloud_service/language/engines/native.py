"""Continuous batching of language sessions: one compute thread, steps of one shape, tokens of many sessions in each.

Everything here but a runner's `run` is on the event loop's thread. From the plan to the results of a step `_busy` is
held: meanwhile the loop only appends to a session's rounds and marks sessions as left or ending.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import get_args

import torch

from isthmus.cloud_service.byte_budget import ByteBudget
from isthmus.cloud_service.language.admission import Backlog, StepTime
from isthmus.cloud_service.language.choosers import Choosers
from isthmus.cloud_service.language.metrics import EngineMetrics
from isthmus.cloud_service.language.model_runner import FullRunner, StepResult, SuffixRunner
from isthmus.cloud_service.language.scheduler import plan_memory, plan_step
from isthmus.cloud_service.language.session import MAX_UNREAD, TOKEN_BYTES, EventQueue, Session, SessionEvent
from isthmus.cloud_service.language.sessions import IDLE_S, CheckedOpening, Sessions
from isthmus.models.errors import CallerError, Draining, IsthmusError, Overloaded, ServiceError, UnknownBundle
from isthmus.models.language.checkpoint.checkpoint import Checkpoint
from isthmus.models.language.handoff.bundle import HandoffBundle
from isthmus.models.language.torch.batch_invariance import check_batch_invariance
from isthmus.models.language.torch.decoder import Decoder
from isthmus.models.messages import ModelInfo, Opening, Processor, Round, TokenizerInfo
from isthmus.protos.limits import MAX_ROUNDS

FIRST_TOKEN_S = 30.0
MIN_RETRY_S = 1.0  # that a device is told to wait after a refusal
LARGE_OPENING = 1024  # tokens; larger ones are checked off the event loop, which takes it some milliseconds


class LanguageEngine:
    """One language model over sessions within a memory budget: of tokens and, with handoffs, of hidden states."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        decoder: Decoder,
        budget_bytes: int,
        metrics: EngineMetrics,
        handoffs: Sequence[HandoffBundle] = (),
        *,
        queue: ByteBudget,
        first_token_s: float = FIRST_TOKEN_S,
        isolated: bool = False,
    ) -> None:
        """`queue`: for what sessions take beside their caches. `first_token_s`: how long a new prompt may wait.

        `isolated`: peers do not share the state of a common beginning.
        Raises BundleError when the KV fill of a handoff does not fit the model."""
        config = checkpoint.config
        self.handoffs = tuple(handoffs)
        self.tokenizer = checkpoint.tokenizer
        self.info = describe_model(checkpoint, decoder, handoffs)
        self._decoder = decoder
        self._full_runner = FullRunner(decoder, checkpoint.tokenizer.eos_ids, handoffs)
        self._suffix_runners = {each.name: each for each in (SuffixRunner(handoff, decoder) for handoff in handoffs)}
        self._metrics = metrics
        self._sessions, self._queue = Sessions(config, budget_bytes, queue, metrics, isolated=isolated), queue
        self._first_token_s, self._step_time = first_token_s, StepTime()
        self._step = 0  # steps computed so far
        self._changed = asyncio.Event()
        self._busy = asyncio.Lock()
        self._draining = False
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="decoder")
        self._choosers = Choosers(self.tokenizer, first_token_s)

    problem = ""  # what cannot be used is not loaded

    def warm_up(self) -> None:
        """Compile kernels, and prove that results do not depend on the batch, if need be with a single thread.

        Raises ServiceError when they do. Threads share rows of attention, on some machines not to the last bit.
        """
        try:
            check_batch_invariance(self._decoder)
        except ServiceError:
            if self._decoder.device.type != "cpu" or torch.get_num_threads() == 1:
                raise
            self._metrics.log_warning("results depend on how threads share rows: computing with one thread")
            torch.set_num_threads(1)
            check_batch_invariance(self._decoder)

    async def open(self, opening: Opening, events: EventQueue, peer: str = "") -> Session:
        """A session with these tokens, which reuses the cache that is held for it. What follows goes to `events`.

        Raises InvalidInput, UnknownBundle, ContextGone, Overloaded or Draining.
        """
        size_bytes = TOKEN_BYTES * len(opening.tokens)
        self._queue.take(size_bytes)  # of the message, until its tokens are the session's
        try:
            chooser = await self._choosers.open(opening, peer)
            async with self._busy:  # the cache that is reused may be part of the step under way
                self._check_open()
                checked = await self._check(opening)
                session = self._sessions.open(checked, chooser, events, peer, self._step)
        finally:
            self._queue.give(size_bytes)
        events.on_read = partial(self._read, session)
        return session

    def add(self, session: Session, round_: Round) -> None:
        """Queue a round. Raises InvalidInput for tokens that the model lacks, PayloadTooLarge, Overloaded, Draining.

        A round of a session that was opened again elsewhere, or lost, is dropped: its device has got an error for it.
        """
        self._check_open()
        if session not in self._sessions:
            return
        self._sessions.check_ids(round_.draft)
        session.sequence.check(round_)
        if len(session.rounds) >= MAX_ROUNDS:
            raise Overloaded(f"{MAX_ROUNDS} rounds of this session are waiting already")
        self._sessions.queue_round(session, round_)
        self._changed.set()

    def end(self, session: Session) -> None:
        """The device sends no more rounds: None follows the events of those that are outstanding."""
        session.ending = True
        if session not in self._sessions:
            session.end()
        self._changed.set()

    def leave(self, session: Session) -> None:
        """The device has disconnected; the cache stays until the memory is needed."""
        self._sessions.leave(session)
        session.events.on_read = lambda: None
        self._changed.set()

    async def keep_within(self, peer: str, limit_bytes: int) -> bool:
        """Free KV caches that no device of `peer` is connected to, beyond a limit. Whether the others are within it."""
        async with self._busy:  # a step may be extending one
            return self._sessions.keep_within(peer, limit_bytes)

    def drain(self) -> None:
        """Send Draining to every device, which keeps its tokens; `run` returns after the step under way."""
        self._draining = True
        for session in self._sessions:
            session.send(Draining("the service is shutting down"))
        self._changed.set()

    async def run(self) -> None:
        """Compute steps until drained."""
        while True:
            async with self._busy:
                for session in list(self._sessions):
                    self._begin(session)
                self._refuse_late()
                plan = self._plan()
                if plan:
                    await self._compute(plan)
            if not plan and self._draining:
                break
            if not plan:
                await self._arrival()
        self._thread.shutdown()
        self._choosers.close()

    async def _check(self, opening: Opening) -> CheckedOpening:
        """A long one is checked in another thread, while no step changes any session."""
        runner, check = self._runner(opening), self._sessions.check
        if opening.start + len(opening.tokens) <= LARGE_OPENING:
            return check(opening, runner)
        return await asyncio.get_running_loop().run_in_executor(None, check, opening, runner)

    def _runner(self, opening: Opening) -> FullRunner | SuffixRunner:
        """Raises UnknownBundle for a handoff of another model."""
        if not opening.handoff:
            return self._full_runner
        if opening.handoff not in self._suffix_runners:
            held = ", ".join(name.hex() for name in self._suffix_runners) or "none"
            raise UnknownBundle(f"handoff {opening.handoff.hex()} is not held here, of this model there is {held}")
        return self._suffix_runners[opening.handoff]

    def _check_open(self) -> None:
        if self._draining:
            raise Draining("the service is shutting down")

    def _read(self, session: Session) -> None:
        """The device has read an event."""
        self._sessions.settle(session)
        if session.events.qsize() == MAX_UNREAD - 1:
            self._changed.set()  # its sequence goes on

    async def _arrival(self) -> None:
        self._sessions.forget_idle()
        self._changed.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(IDLE_S / 10):  # `wait_for` of Python 3.11 can swallow a cancellation
                await self._changed.wait()

    def _begin(self, session: Session) -> None:
        """Schedule the session's next round; rounds that need no step are answered at once."""
        sequence = session.sequence
        if (self._draining or not session.attached) and (session.rounds or sequence.scheduled is not None):
            session.rounds.clear()
            sequence.scheduled = None
            self._sessions.settle(session)
        while sequence.scheduled is not None or session.rounds:
            if session.rounds and (sequence.scheduled is None or sequence.scheduled.extension):
                sequence.scheduled = None  # a round ends the extension of the one before
                reply = sequence.begin(*session.rounds.popleft())
                if reply is not None:
                    session.send(reply)
            elif sequence.lost:
                self._sessions.drop_lost(session)
            elif self._sessions.fits(session):
                return
            else:
                self._fail(session, self._sessions.too_large(sequence.final_length))
        if session.ending:
            session.end()

    def _refuse_late(self) -> None:
        """Refuse first rounds of sessions that would wait for longer than they may, and those that have."""
        waiting = [session for session in self._sessions.attached if session.awaits_first_token]
        if not waiting:
            return
        backlog, now_s = Backlog(self._decoder.width), time.monotonic()
        for session in self._sessions.attached:
            if session.admitted and session.backlog:
                backlog.add(session.peer, session.backlog)
        for session in waiting:
            wait_s = session.waited_s(now_s)
            if not session.admitted:
                wait_s = self._step_time.seconds * backlog.wait_steps(session.peer, session.backlog)
            if wait_s > self._first_token_s:
                self._refuse(session, wait_s)
            elif not session.admitted:
                session.admitted = True
                backlog.add(session.peer, session.backlog)

    def _refuse(self, session: Session, wait_s: float) -> None:
        self._metrics.refused()
        session.sequence.scheduled = None
        limit_s = self._first_token_s
        text = f"the first token would wait {wait_s:.1f} s for other prompts, the limit is {limit_s:.1f} s"
        session.send(Overloaded(text, max(wait_s - limit_s, MIN_RETRY_S)))

    def _plan(self) -> list[tuple[Session, int]]:
        """Tokens of each session in the next step; all of them have the same runner. Grants memory on the way."""
        attached = self._sessions.attached
        requests = [request for session in attached if (request := session.memory_request(self._step))]
        resting = [cache for session in attached if (cache := session.resting_cache(self._step))]
        grants = plan_memory(requests, self._sessions.budget, self._step, resting)
        granted = [self._sessions.carry_out(grant, self._step) for grant in grants]
        by_ticket = {session.ticket: session for session in granted}
        candidates = [session.candidate() for session in granted]
        plan = plan_step(candidates, self._decoder.width, self._sessions.served)
        return [(by_ticket[ticket], tokens) for ticket, tokens in plan]

    async def _compute(self, plan: Sequence[tuple[Session, int]]) -> None:
        started_s = time.monotonic()
        for session, _ in plan:
            assert session.sequence.scheduled is not None
            session.sequence.scheduled.started_s = session.sequence.scheduled.started_s or started_s
        loop, runner = asyncio.get_running_loop(), plan[0][0].next_runner
        parts = [(session.sequence, tokens) for session, tokens in plan]
        try:
            result = await loop.run_in_executor(self._thread, runner.run, parts)
        except Exception:  # whatever fails, every device gets an error and the service lives on
            self._metrics.log_failure("step failed")
            result = StepResult([ServiceError("the step failed") for _ in plan], sum(tokens for _, tokens in plan))
        self._step += 1
        now_s = time.monotonic()
        if result.tokens:
            self._step_time.observe(now_s - started_s)
            self._metrics.step(result.tokens, self._decoder.width, now_s - started_s)
        self._metrics.states(result.tokens if isinstance(runner, SuffixRunner) else 0, result.filled)
        for (session, _), extent in zip(plan, result.extents, strict=False):
            self._metrics.processed(session.spend(extent))
        for (session, _), outcome in zip(plan, result.outcomes, strict=True):
            session.last_step = self._sessions.served[session.peer] = self._step
            self._sessions.record_prefix(session)
            if outcome is not None:
                self._finish(session, outcome, now_s)
        self._sessions.report()

    def _finish(self, session: Session, outcome: SessionEvent, now_s: float) -> None:
        """A step ended a session's round."""
        if session.prefilling:
            session.first_step, session.prefilling = self._step, False
        if isinstance(outcome, IsthmusError):
            self._fail(session, outcome)
            return
        work = session.sequence.scheduled
        assert work is not None
        own = min(len(outcome.tokens), 1) + work.forced  # beside forced tokens at most the last one is new
        if work.states:
            self._metrics.handoff_round(own)
        elif not work.score:
            self._metrics.committed(work.matched, len(work.draft), own)
        session.sequence.next_extension(now_s)
        session.answered = True
        session.send(outcome)
        try:
            self._sessions.settle(session, grow=True)
        except Overloaded as error:
            self._fail(session, error)

    def _fail(self, session: Session, error: IsthmusError) -> None:
        session.sequence.scheduled = None
        if not isinstance(error, CallerError):
            self._sessions.drop_cache(session)
        session.send(error)


def describe_model(checkpoint: Checkpoint, decoder: Decoder, handoffs: Sequence[HandoffBundle]) -> ModelInfo:
    """What the service declares of a model that it holds."""
    tokenizer = checkpoint.tokenizer
    return ModelInfo(
        fingerprint=checkpoint.fingerprint,
        name=checkpoint.name,
        vocab=checkpoint.config.vocab,
        context=checkpoint.config.context,
        numerics="bitwise",
        tokenizer=TokenizerInfo(tokenizer.fingerprint, len(tokenizer.to_bytes()), tokenizer.vocabulary),
        end_ids=tuple(sorted(tokenizer.eos_ids)),
        arms=("cloud", "verify", "handoff") if handoffs else ("cloud", "verify"),
        precision=decoder.precision,
        handoffs=tuple(handoff.fingerprint for handoff in handoffs),
        processors=get_args(Processor),
        scores=True,
    )
