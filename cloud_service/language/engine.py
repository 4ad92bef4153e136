"""Continuous batching of language sessions: one compute thread, passes of one shape, rows of many sessions in each.

Everything here but `_compute` runs on the event loop's thread. From the plan to the answers of a pass `_busy` is held:
meanwhile the loop only appends to a session's rounds and marks sessions as left or ending.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from isthmus.cloud_service.language.metrics import EngineMetrics
from isthmus.cloud_service.language.model_runner import FullRunner, PrefixRunner, StepResult, SuffixRunner
from isthmus.cloud_service.language.sessions import IDLE_S, EventQueue, Session, SessionEvent, Sessions
from isthmus.cloud_service.vision.batching import Candidate, next_pass
from isthmus.models.errors import CallerError, Draining, IsthmusError, Overloaded, ServiceError, UnknownBundle
from isthmus.models.language.checkpoint.checkpoint import Checkpoint
from isthmus.models.language.handoff.bundle import HandoffBundle
from isthmus.models.language.torch.decoder import Decoder, check_batch_invariance
from isthmus.models.messages import ModelInfo, Opening, Round
from isthmus.protos.limits import MAX_ROUNDS

STAY_PASSES = 32  # how long a session at work keeps its whole state when others want the memory: less would only thrash

StepPlan = list[tuple[Session, int]]  # rows of each session in a pass; all have the same layers


class LanguageEngine:
    """One language model over sessions within a memory budget; with hand-offs, of hidden states too."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        decoder: Decoder,
        budget_bytes: int,
        metrics: EngineMetrics,
        handoffs: Sequence[HandoffBundle] = (),
    ) -> None:
        """Raises BundleError when the fill of a hand-off does not fit the model."""
        config, dtype = checkpoint.config, str(decoder.dtype).removeprefix("torch.")
        numerics = f"{dtype}/{decoder.width}"
        fingerprints = tuple(handoff.fingerprint for handoff in handoffs)
        self.info = ModelInfo(
            checkpoint.fingerprint, checkpoint.name, config.vocab, config.context, numerics, fingerprints
        )
        self._decoder = decoder
        self._whole = FullRunner(decoder, checkpoint.tokenizer.eos_ids, handoffs)
        self._behind = {each.name: each for each in (SuffixRunner(handoff, decoder) for handoff in handoffs)}
        self._metrics = metrics
        self._sessions = Sessions(config, budget_bytes, metrics)
        self._passes = 0
        self._changed = asyncio.Event()
        self._busy = asyncio.Lock()
        self._draining = False
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="decoder")

    def warm_up(self) -> None:
        """Compile kernels, and prove that answers do not depend on the batch, if need be with a single thread.

        Raises ServiceError when they do. Threads share rows of attention, and on some machines not to the last bit.
        """
        try:
            check_batch_invariance(self._decoder)
        except ServiceError:
            if torch.get_num_threads() == 1:
                raise
            self._metrics.log_warning("kernels give rows other bits when threads share them: computing with one thread")
            torch.set_num_threads(1)
            check_batch_invariance(self._decoder)

    async def open(self, opening: Opening, answers: EventQueue) -> Session:
        """A session with these tokens, its state taken over as far as it is held. What follows goes to `answers`.

        Raises InvalidInput, UnknownBundle, ContextGone, Overloaded or Draining.
        """
        async with self._busy:  # the state that is taken over may be part of a pass
            self._check_open()
            return self._sessions.open(opening, self._layers(opening), answers, self._passes)

    def add(self, session: Session, round_: Round) -> None:
        """Queue a round. Raises InvalidInput for tokens that the model lacks, PayloadTooLarge, Overloaded, Draining.

        Of a session that was opened again elsewhere, or lost its state, it is dropped: its device has been told.
        """
        self._check_open()
        if session not in self._sessions:
            return
        self._sessions.check_ids(round_.draft)
        session.text.check(round_)
        if len(session.rounds) >= MAX_ROUNDS:
            raise Overloaded(f"{MAX_ROUNDS} rounds of this session are waiting already")
        session.rounds.append((round_, time.monotonic()))
        self._changed.set()

    def end(self, session: Session) -> None:
        """The device sends no more rounds: None follows the answers of those that are outstanding."""
        session.ending = True
        if session not in self._sessions:
            session.end()
        self._changed.set()

    def leave(self, session: Session) -> None:
        """The device has gone; the state stays until the memory is wanted."""
        self._sessions.leave(session)
        self._changed.set()

    def drain(self) -> None:
        """Tell every device to go elsewhere, with the tokens it has; `run` returns after the pass at hand."""
        self._draining = True
        for session in self._sessions:
            session.tell(Draining("the service is shutting down"))
        self._changed.set()

    async def run(self) -> None:
        """Compute passes until drained."""
        while True:
            async with self._busy:
                for session in list(self._sessions):
                    self._begin(session)
                plan = self._plan()
                if plan:
                    await self._pass(plan)
            if not plan and self._draining:
                break
            if not plan:
                await self._arrival()
        self._thread.shutdown()

    def _layers(self, opening: Opening) -> FullRunner | SuffixRunner:
        """Raises UnknownBundle for a hand-off that is not this model's."""
        if not opening.handoff:
            return self._whole
        if opening.handoff not in self._behind:
            held = ", ".join(name.hex() for name in self._behind) or "none"
            raise UnknownBundle(f"hand-off {opening.handoff.hex()} is not held here, of this model there is {held}")
        return self._behind[opening.handoff]

    def _check_open(self) -> None:
        if self._draining:
            raise Draining("the service is shutting down")

    async def _arrival(self) -> None:
        self._sessions.forget_idle()
        self._changed.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(IDLE_S / 10):  # `wait_for` of Python 3.11 can swallow a cancellation
                await self._changed.wait()

    def _begin(self, session: Session) -> None:
        """Take up the next round that needs a pass; those that need none are answered at once."""
        text = session.text
        if self._draining or not session.attached:
            session.rounds.clear()
            text.work = None
        while text.work is not None or session.rounds:
            if session.rounds and (text.work is None or text.work.extension):
                text.work = None  # a round ends what the cloud was decoding by itself
                at_once = text.begin(*session.rounds.popleft())
                if at_once is not None:
                    session.tell(at_once)
            elif text.lost:
                self._sessions.lose(session)
            elif self._sessions.fits(session):
                return
            else:
                self._fail(session, self._sessions.too_large(text.extent))
        if session.ending:
            session.end()

    def _plan(self) -> StepPlan:
        """Rows of the next pass, for sessions that have memory: who is at work keeps it, who waits longest gets it."""
        waiting = [session for session in self._sessions if session.text.work is not None]
        stay = sorted(filter(self._stays, waiting), key=lambda session: (session.admitted, session.ticket))
        others = [session for session in waiting if not self._stays(session)]
        served: dict[bytes, Session] = {}
        for session in filter(is_whole, stay):  # the first always gets what it needs, if need be from those behind it
            if self._sessions.make_room(session, served.keys(), self._passes):
                served[session.name] = session
        for session in filter(is_whole, sorted(others, key=lambda session: (session.served, session.ticket))):
            if not self._sessions.make_room(session, served.keys(), self._passes):
                break  # or small ones would overtake a large one for ever
            served[session.name] = session
        by_ticket = {session.ticket: session for session in served.values()}
        wants = [
            Candidate(ticket, session.text.rows, session.served, due(session)) for ticket, session in by_ticket.items()
        ]
        return [(by_ticket[ticket], rows) for ticket, rows in next_pass(wants, self._decoder.width)]

    def _stays(self, session: Session) -> bool:
        work = session.text.work
        at_work = work is not None and (work.passes > 0 or self._passes - session.admitted < STAY_PASSES)
        return at_work and session.text.cache is not None

    async def _pass(self, plan: StepPlan) -> None:
        started_s = time.monotonic()
        for session, _ in plan:
            assert session.text.work is not None
            session.text.work.started_s = session.text.work.started_s or started_s
        loop, layers = asyncio.get_running_loop(), due(plan[0][0])
        parts = [(session.text, rows) for session, rows in plan]
        try:
            passed = await loop.run_in_executor(self._thread, layers.run, parts)
        except Exception:  # whatever went wrong, every device hears of it and the service lives on
            self._metrics.log_failure("pass failed")
            passed = StepResult([ServiceError("the pass failed") for _ in plan], sum(rows for _, rows in plan))
        self._passes += 1
        now_s = time.monotonic()
        if passed.rows:
            self._metrics.passed(passed.rows, self._decoder.width, now_s - started_s)
        self._metrics.took(passed.rows if isinstance(layers, SuffixRunner) else 0, passed.filled)
        for (session, _), answer in zip(plan, passed.outcomes, strict=True):
            session.served = self._passes
            if session.reading and answer is not None:
                session.admitted, session.reading = self._passes, False
            self._answer(session, answer, now_s)
        self._sessions.measure()

    def _answer(self, session: Session, answer: SessionEvent | None, now_s: float) -> None:
        if answer is None:
            return
        if isinstance(answer, IsthmusError):
            self._fail(session, answer)
            return
        work = session.text.work
        assert work is not None
        own = min(len(answer.tokens), 1)  # at most the last is new
        if work.states:
            self._metrics.handed_off(own)
        else:
            self._metrics.committed(work.matched, len(work.draft), own)
        session.text.next_extension(now_s)
        session.tell(answer)

    def _fail(self, session: Session, error: IsthmusError) -> None:
        session.text.work = None
        if not isinstance(error, CallerError):
            self._sessions.forget_state(session)
        session.tell(error)


def due(session: Session) -> FullRunner | PrefixRunner | SuffixRunner:
    """The layers of its next rows."""
    return session.layers.due(session.text)


def is_whole(session: Session) -> bool:
    """Whether its round can go on: not when the same plan has just given its memory to another."""
    return not session.text.lost
