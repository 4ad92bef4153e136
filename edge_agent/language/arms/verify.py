"""One answer with the cloud: the device drafts ahead, the cloud confirms or corrects, the confirmed is the answer.

    text (committed)  | ahead (drafted): in rounds under way, then not sent yet

The cloud decides every token, by one routine whoever drafts, so `cloud` and `verify` give the same text. When the cloud
is lost, the next replica goes on from the committed tokens, or the device alone until one is back.
Knows nothing about text, only tokens; nothing about gRPC.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from isthmus.edge_agent.language.cloud_answer import ASKED, CloudAnswer
from isthmus.edge_agent.language.replicas import Replicas
from isthmus.edge_agent.language.request import GenerationRequest, Source, Token, cloud_token
from isthmus.edge_agent.policy.estimates import Average
from isthmus.edge_agent.policy.speculation import MAX_DRAFTS, Acceptance, LatencyModel, MeasuredLatency, next_step
from isthmus.edge_agent.transport.generate_stream import GenerateStream
from isthmus.edge_agent.transport.link import Link
from isthmus.models.errors import ContextGone, IsthmusError, ServiceError
from isthmus.models.language.drafts import Draft
from isthmus.models.messages import Committed, Opening, Round
from isthmus.protos.limits import MAX_DRAFT
from isthmus.protos.wire_session import checksum

FREE_S = 0.001  # drafts that cost less are made beside a stream, not instead of it
FREE_DRAFTS = 3  # of them, at least, before a stream is interrupted


@dataclass
class SpeculationStats:
    """What an agent has learnt about a draft source and the cloud's speed; it outlives one answer."""

    draft_s: Average = field(default_factory=lambda: Average(0.02))
    pass_s: Average = field(default_factory=lambda: Average(0.1))  # slow until known: then drafting is tried
    acceptance: Acceptance = field(default_factory=Acceptance)
    measured: MeasuredLatency = field(default_factory=MeasuredLatency)

    def pace(self, link: Link) -> LatencyModel:
        rtt_s = link.estimate.rtt_s
        pass_s, draft_s, acceptance = self.pass_s.value, self.draft_s.value, self.acceptance.overall
        return LatencyModel(rtt_s, pass_s, draft_s, acceptance, self.measured.value, self.measured.tokens)

    def fade(self) -> None:
        """Another text may follow: what was learnt of this one says less of that."""
        self.measured.fade()
        self.acceptance.fade()


@dataclass
class SentRound:
    """A round under way; not `live` when the text is known to have gone another way."""

    base: int
    draft: tuple[int, ...]
    live: bool = True


class VerifyArm(CloudAnswer):
    """One answer whose every token the cloud decides."""

    def __init__(
        self,
        ask: GenerationRequest,
        eos_ids: frozenset[int],
        replicas: Replicas,
        tempo: SpeculationStats,
        draft: Draft | None,
        alone: Callable[[list[int]], Token | None] | None,
        prefill_layers: int = 0,
    ) -> None:
        """`draft` None: the cloud decodes by itself. `alone` as for CloudAnswer. `prefill_layers` as LanguageConfig."""
        super().__init__(ask, eos_ids, replicas, alone)
        self._tempo, self._draft, self._prefill_layers = tempo, draft, prefill_layers
        self._ahead: list[tuple[int, float]] = []  # drafted, with confidence
        self._sent = 0  # of `_ahead`, in rounds under way
        self._rounds: deque[SentRound] = deque()
        self._streaming = False
        self._read = False  # whether the cloud has read the prompt: its passes for it decide no tokens
        self._ready: tuple[GenerateStream, Link] | None = None  # opened and asked before anybody wanted tokens

    def prepare(self) -> None:
        """Have a cloud read the prompt and decide what follows it, while the device does something else."""
        if (link := self._replicas.best()) is not None:
            conversation = link.open_generate_stream()
            self._ready = conversation, link
            self._open(conversation, link, self._seat.held if self._seat.target == link.target else 0)
            self._send(conversation, (), extend=self._left - 1)

    @property
    def answered(self) -> bool:
        """Whether the first token of what was prepared is there, or will not come."""
        return self._ready is None or self._ready[0].answered

    def close(self) -> None:
        """Also of what was prepared and not wanted."""
        if self._ready is not None:
            conversation, link = self._ready
            with suppress(IsthmusError):
                if (committed := conversation.poll()) is not None:
                    self._count(committed)
            self._seat.held = len(self._text)
            self._end(conversation, link)
        if self._draft is not None:
            self._tempo.fade()
        super().close()

    def _with_cloud(self, link: Link) -> Iterator[Token]:
        conversation, link = self._ready or (link.open_generate_stream(), link)
        self._reopened = None
        try:
            if self._ready is None:
                self._open(conversation, link, self._seat.held if self._seat.target == link.target else 0)
            self._ready = None
            if self._streams(link):
                yield from self._stream(conversation, link)
            else:
                yield from self._verify(conversation, link)
        finally:
            self._end(conversation, link)

    def _open(self, conversation: GenerateStream, link: Link, held: int) -> None:
        self._rounds.clear()
        self._sent, self._read = 0, False
        opening = Opening(
            model=self._replicas.fingerprint,
            session=self._seat.session,
            start=held,
            tokens=tuple(self._text[held:]),
            crc32=checksum(self._text),
            sampling=self._ask.sampling,
            logprobs=self._ask.top_logprobs,
            prefill_layers=self._prefill_layers,
        )
        conversation.open(opening)
        self._seat.target, self._seat.held = link.target, held

    def _streams(self, link: Link) -> bool:
        """Whether the cloud decodes by itself: as asked, or drafting does not pay, or drafts come for nothing."""
        if self._draft is None:
            return True
        pace = self._tempo.pace(link)
        if pace.draft_s >= FREE_S and pace.streams:
            self._explain(pace)
            return True
        return pace.draft_s < FREE_S

    def _stream(self, conversation: GenerateStream, link: Link) -> Iterator[Token]:
        """The cloud goes on by itself; drafts that cost nothing are thrown in."""
        free = self._draft if self._draft is not None and self._tempo.draft_s.value < FREE_S else None
        self._streaming = True
        if not self._rounds:
            self._send(conversation, (), extend=self._left - 1)
        while not self._finished:
            yield from self._take(self._receive(conversation, link))
            if free is None or self._finished or any(sent.live for sent in self._rounds):
                continue
            ids = self._look_ahead(free, self._tempo.pace(link))
            if len(ids) >= FREE_DRAFTS:
                self._send(conversation, ids, extend=self._left - 1)  # all of the draft may be wrong
                self._sent = len(ids)

    def _explain(self, pace: LatencyModel) -> None:
        """Say why it streams, unless there is worse to say."""
        if self.tally.why == ASKED:
            self.tally.why = why_streaming(pace)

    def _look_ahead(self, draft: Draft, pace: LatencyModel) -> tuple[int, ...]:
        """As many free drafts as may be right and reach beyond what the cloud decodes meanwhile."""
        self._ahead, self._sent = [], 0
        wanted = min(MAX_DRAFTS + int(pace.rtt_s / max(pace.pass_s, 0.001)), MAX_DRAFT, self._left - 1)
        likely = 1.0
        while len(self._ahead) < wanted and likely > 0.3:
            found = draft.next([*self._text, *(id_ for id_, _ in self._ahead)], self._ask.sampling)
            if found is None:
                break
            likely *= self._tempo.acceptance.calibrated(found[1])
            self._ahead.append(found)
        return tuple(id_ for id_, _ in self._ahead)

    def _verify(self, conversation: GenerateStream, link: Link) -> Iterator[Token]:
        """Draft, send, and wait only when there is nothing better to do."""
        assert self._draft is not None
        self._streaming = False
        self._send(conversation, ())  # the prompt's own round: its answer comes while the device reads the prompt
        exhausted, clock = False, Clock(self._tempo.measured)
        while not self._finished:
            while not self._finished and (committed := self._poll(conversation, link)) is not None:
                yield from self._take(committed)
                clock.made(self._made)
                exhausted = False
            if self._finished:
                return
            pace = self._tempo.pace(link)
            confidences = [self._tempo.acceptance.calibrated(confidence) for _, confidence in self._ahead]
            exhausted = exhausted or len(self._ahead) >= self._left - 1
            under_way = sum(sent.live for sent in self._rounds)
            step = next_step(pace, confidences, self._sent, under_way, exhausted)
            if step == "draft":
                exhausted = not self._draft_one()
            elif step == "send":
                if pace.streams or not self._ahead:
                    yield from self._change_to_stream(conversation, link, pace)
                    return
                self._send(conversation, tuple(id_ for id_, _ in self._ahead[self._sent :]))
                self._sent = len(self._ahead)
            else:
                yield from self._take(self._receive(conversation, link))
                clock.made(self._made)
                exhausted = False

    def _change_to_stream(self, conversation: GenerateStream, link: Link, pace: LatencyModel) -> Iterator[Token]:
        self._explain(pace)
        while self._rounds and not self._finished:
            yield from self._take(self._receive(conversation, link))
        if not self._finished:
            self._ahead, self._sent = [], 0
            yield from self._stream(conversation, link)

    def _draft_one(self) -> bool:
        """Draft one token more; False when the source has no idea."""
        assert self._draft is not None
        text = [*self._text, *(id_ for id_, _ in self._ahead)]
        if self._ahead and text[-1] in self._eos_ids:
            return False
        started_s = time.monotonic()
        found = self._draft.next(text, self._ask.sampling)
        if self._made or self._ahead:  # the first one reads the prompt
            self._tempo.draft_s.observe(time.monotonic() - started_s)
        if found is None:
            return False
        self._ahead.append(found)
        return True

    def _send(self, conversation: GenerateStream, draft: tuple[int, ...], extend: int = 0) -> None:
        base = len(self._text) + self._sent
        conversation.send(Round(base, draft, extend))
        self._rounds.append(SentRound(base, draft))

    def _poll(self, conversation: GenerateStream, link: Link) -> Committed | None:
        """An answer that is there already."""
        try:
            return conversation.poll()
        except ContextGone:
            self._open_again(conversation, link)
            return None

    def _open_again(self, conversation: GenerateStream, link: Link) -> None:
        self._check_reopened()
        self._ahead = []
        self._open(conversation, link, 0)
        self._send(conversation, (), extend=self._left - 1 if self._streaming else 0)

    def _receive(self, conversation: GenerateStream, link: Link) -> Committed:
        while True:
            try:
                return super()._receive(conversation, link)
            except ContextGone:
                self._open_again(conversation, link)

    def _take(self, committed: Committed) -> Iterator[Token]:
        """What an answer adds to the text. Raises ServiceError for one that no round of this text can have."""
        if committed.base > len(self._text) or not (committed.extension or self._rounds):
            raise ServiceError("the cloud answered what it was not asked")
        sent = SentRound(committed.base, ()) if committed.extension else self._rounds.popleft()
        self._count(committed)
        if committed.base != sent.base or not (committed.accepted or committed.tokens):
            if sent.live:
                raise ServiceError("the cloud holds another text than it committed")
            return  # the draft was stale
        ids = [*sent.draft[: committed.accepted], *committed.tokens]
        known = len(self._text) - committed.base
        fresh = ids[known:][: self._left]
        self._compare(fresh)
        rows = committed.logprobs[-len(ids[known:]) :] if committed.logprobs else ()
        for index, id_ in enumerate(fresh):
            source: Source = "draft" if known + index < committed.accepted else "cloud"
            token = cloud_token(id_, source, rows[index] if index < len(rows) else None)
            self._add(token)
            self._seat.held = len(self._text)
            self.tally.accepted += source == "draft"
            yield token
            if self._finished:
                return

    def _compare(self, fresh: Sequence[int]) -> None:
        """Hold what was drafted against what the cloud chose: learn from it, and forget drafts of another text."""
        matched = 0
        for (drafted, confidence), id_ in zip(self._ahead, fresh, strict=False):
            self._tempo.acceptance.observe(confidence, drafted == id_)
            if drafted != id_:
                break
            matched += 1
        if matched == min(len(fresh), len(self._ahead)):
            self._ahead = self._ahead[matched:]
            self._sent = max(self._sent - len(fresh), 0)
            return
        self.tally.rejected += max(self._sent - matched, 0)
        self._ahead, self._sent = [], 0
        for sent in self._rounds:
            sent.live = False

    def _count(self, committed: Committed) -> None:
        self.tally.rounds += not committed.extension
        reading = 0 if self._read else max(committed.passes - 1, 0)
        self._read = True
        self.tally.prefill_passes += reading
        self.tally.passes += committed.passes - reading
        self.tally.cached += committed.held
        self.tally.cloud_s += committed.queue_s + committed.compute_s
        if committed.passes == 1:
            self._tempo.pass_s.observe(committed.queue_s + committed.compute_s)

    def _without_cloud(self, failure: IsthmusError | None) -> Iterator[Token]:
        self._ahead, self._sent = [], 0
        yield from super()._without_cloud(failure)


class Clock:
    """Times committed tokens from the first of an answer on: before it, the prompt is read."""

    def __init__(self, measured: MeasuredLatency) -> None:
        self._measured = measured
        self._made = 0
        self._at_s = 0.0

    def made(self, tokens: int) -> None:
        """So many tokens of the answer are there now."""
        now_s = time.monotonic()
        if self._made and tokens > self._made:
            self._measured.observe(now_s - self._at_s, tokens - self._made)
        if tokens > self._made:
            self._made, self._at_s = tokens, now_s


def why_streaming(pace: LatencyModel) -> str:
    return f"drafting takes {1000 * pace.drafting_s:.0f} ms a token here, the cloud alone {1000 * pace.stream_s:.0f} ms"
