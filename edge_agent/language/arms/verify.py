"""The arm `verify`: speculative decoding. The device drafts ahead, the cloud accepts or corrects, and commits.

The cloud decides every token, by one routine whoever drafts, so `verify` and `cloud` give the same text. Where drafting
does not pay, the cloud decodes by itself; drafts that cost nothing are still sent beside.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence

from isthmus.edge_agent.language.arms.rounds import Rounds
from isthmus.edge_agent.language.remote_session import Fallback, RemoteSession
from isthmus.edge_agent.language.request import Token
from isthmus.edge_agent.language.sequence import AnswerSequence
from isthmus.edge_agent.language.stats import GenerationStats, WorkClock
from isthmus.edge_agent.policy.speculation import (
    MAX_DRAFTS,
    LatencyModel,
    MeasuredLatency,
    SpeculationStats,
    next_action,
)
from isthmus.models.language.drafts import Draft
from isthmus.models.language.processors import TokenChooser
from isthmus.models.messages import Committed
from isthmus.protos.limits import MAX_DRAFT

FREE_S = 0.001  # drafts that cost less are sent beside a stream, not instead of it
FREE_DRAFTS = 3  # of them, at least, before a stream is interrupted
PAUSE_SHARE = 0.1  # of the time between tokens, in which their reader has not asked; with more it is not measured
LEAST_LIKELY = 0.3  # free drafts that are all right with less probability are not sent

AskSource = Callable[[Sequence[int], TokenChooser], tuple[int, float] | None]  # as Draft.next


class VerifyArm:
    """One answer whose every token the cloud decides."""

    def __init__(
        self,
        sequence: AnswerSequence,
        session: RemoteSession,
        stats: GenerationStats,
        speculation: SpeculationStats,
        draft: Draft,
        fallback: Fallback | None,
    ) -> None:
        """`fallback` generates while no replica can be used; None: wait for one."""
        self._sequence, self._session, self._stats, self._fallback = sequence, session, stats, fallback
        self._speculation, self._draft = speculation, draft
        self._rounds = Rounds(session, sequence, stats, speculation)
        self._timer = TokenTimer(speculation.measured, stats.clock)
        self._exhausted = False  # the source has no further draft, until something is committed

    def tokens(self) -> Generator[Token, None, None]:
        """Committed tokens. Raises as RemoteSession.tokens."""
        try:
            yield from self._session.tokens(self._remote, self._fallback, lambda: self._sequence.finished)
        finally:
            self._session.disconnect()
            self._speculation.fade()

    def _remote(self) -> Iterator[Token]:
        self._rounds.open()
        latency = self._latency()
        if latency.draft_s >= FREE_S and not latency.prefers_streaming:
            yield from self._verify()
            return
        if latency.draft_s >= FREE_S:
            self._stats.reason = why_streaming(latency)
        yield from self._stream()

    def _latency(self) -> LatencyModel:
        return self._speculation.latency(self._session.rtt_s)

    def _stream(self) -> Iterator[Token]:
        """The cloud decodes by itself; drafts that cost nothing are sent beside."""
        free = self._speculation.draft_s.value < FREE_S
        self._rounds.streaming = True
        if not len(self._rounds):
            self._rounds.send()
        while not self._sequence.finished:
            yield from self._rounds.commit(self._rounds.receive())
            if not free or self._sequence.finished or self._rounds.live:
                continue
            ids = self._look_ahead()
            if len(ids) >= FREE_DRAFTS:
                self._rounds.send(ids)
                self._rounds.sent = len(self._rounds.drafts)

    def _look_ahead(self) -> tuple[int, ...]:
        """As many free drafts as are likely right and reach beyond what the cloud decodes meanwhile."""
        self._rounds.clear()
        latency = self._latency()
        count = MAX_DRAFTS + int(latency.rtt_s / max(latency.step_s, 0.001))
        count, likely = min(count, MAX_DRAFT, self._sequence.remaining - 1), 1.0
        drafts = self._rounds.drafts
        while len(drafts) < count and likely > LEAST_LIKELY:
            found = self._next(self._draft.next)
            if found is None:
                break
            likely *= self._speculation.acceptance.calibrated(found[1])
            drafts.append(found)
        return self._rounds.unsent

    def _verify(self) -> Iterator[Token]:
        """Draft, send, and wait only when there is nothing better to do."""
        self._rounds.streaming = False
        self._rounds.send()  # the prompt's own round: its reply comes while the device reads the prompt
        self._timer.restart()
        self._exhausted = False
        while not self._sequence.finished:
            while not self._sequence.finished and (committed := self._rounds.poll()) is not None:
                yield from self._commit(committed)
            if self._sequence.finished:
                return
            latency = self._latency()
            action = self._next_action(latency)
            if action == "draft":
                self._exhausted = not self._draft_one()
            elif action == "wait":
                yield from self._commit(self._rounds.receive())
            elif latency.prefers_streaming or not self._rounds.drafts:
                yield from self._change_to_stream(latency)
                return
            else:
                self._rounds.send(self._rounds.unsent)
                self._rounds.sent = len(self._rounds.drafts)

    def _next_action(self, latency: LatencyModel) -> str:
        drafts = self._rounds.drafts
        confidences = [self._speculation.acceptance.calibrated(confidence) for _, confidence in drafts]
        exhausted = self._exhausted = self._exhausted or len(drafts) >= self._sequence.remaining - 1
        return next_action(latency, confidences, self._rounds.sent, self._rounds.live, exhausted)

    def _commit(self, committed: Committed) -> Iterator[Token]:
        yield from self._rounds.commit(committed)
        self._timer.record(self._sequence.generated)
        self._exhausted = False

    def _change_to_stream(self, latency: LatencyModel) -> Iterator[Token]:
        self._stats.reason = why_streaming(latency)
        while len(self._rounds) and not self._sequence.finished:
            yield from self._rounds.commit(self._rounds.receive())
        if not self._sequence.finished:
            self._rounds.clear()
            yield from self._stream()

    def _draft_one(self) -> bool:
        """Draft one more token; False when the source has none."""
        if (found := self._next(self._timed)) is not None:
            self._rounds.drafts.append(found)
        return found is not None

    def _next(self, ask: AskSource) -> tuple[int, float] | None:
        """A draft by `ask`, which is not asked after the end of a text, nor for what the grammar forces."""
        text, chooser = [*self._sequence.tokens, *(id_ for id_, _ in self._rounds.drafts)], self._sequence.chooser
        if self._rounds.drafts and self._sequence.ends(text[-1]):
            return None
        forced = chooser.forced(text)
        return ask(text, chooser) if forced is None else (forced, 1.0)

    def _timed(self, text: Sequence[int], chooser: TokenChooser) -> tuple[int, float] | None:
        """A draft of the source, whose time counts unless it had to read the prompt."""
        started_s = time.monotonic()
        found = self._draft.next(text, chooser)
        if self._sequence.generated or self._rounds.drafts:
            self._speculation.draft_s.observe(time.monotonic() - started_s)
        return found


class TokenTimer:
    """Times committed tokens from the first of an answer on: before it, the prompt is read."""

    def __init__(self, measured: MeasuredLatency, clock: WorkClock) -> None:
        self._measured, self._clock = measured, clock
        self._generated = 0
        self._at_s = self._paused_s = 0.0

    def restart(self) -> None:
        """The next token is not compared with what came before."""
        self._generated = 0

    def record(self, generated: int) -> None:
        """So many tokens of the answer are there now. After a pause of the reader replies were there before."""
        if generated <= self._generated:
            return
        now_s, paused_s = self._clock.now_s(), self._clock.paused_s
        seconds = now_s - self._at_s
        if self._generated and paused_s - self._paused_s <= PAUSE_SHARE * seconds:
            self._measured.observe(seconds, generated - self._generated)
        self._generated, self._at_s, self._paused_s = generated, now_s, paused_s


def why_streaming(latency: LatencyModel) -> str:
    return (
        f"drafting takes {1000 * latency.drafting_s:.0f} ms a token here,"
        f" the cloud alone {1000 * latency.stream_s:.0f} ms"
    )
