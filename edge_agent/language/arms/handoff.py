"""One answer by layers shared: the device runs the lower ones and decides what its exits are sure of.

    text -> lower layers -> exit sure?  yes: the token is made here
                                        no:  rows of all tokens not sent yet go up, and the cloud completes this one

Rows of tokens that were made here go up in the background, coded, once the cloud has been asked for something. When the
cloud is lost the device goes on through all layers. Knows nothing about text, only tokens; nothing about gRPC.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby

from isthmus.edge_agent.language.cloud_answer import CloudAnswer
from isthmus.edge_agent.language.replicas import Replicas
from isthmus.edge_agent.language.request import GenerationRequest, Token, cloud_token, edge_token
from isthmus.edge_agent.transport.generate_stream import GenerateStream
from isthmus.edge_agent.transport.link import Link
from isthmus.models.errors import ContextGone, ServiceError
from isthmus.models.language.handoff.bundle import HandoffBundle
from isthmus.models.language.handoff.manifest import StatePoint
from isthmus.models.language.onnx.exits import Choice, ExitingDecoder
from isthmus.models.language.packing import Floats
from isthmus.models.messages import Committed, Opening, Round
from isthmus.protos.limits import MAX_STATES
from isthmus.protos.wire_session import checksum

BACKGROUND_ROWS = 8  # that go up without a question


@dataclass(frozen=True)
class HandoffSettings:
    """When an exit is believed, and how rows cross.

    likely: how likely right an exit must be. point: how rows are coded. fill: the cloud need not compute what decides
    nothing.
    """

    likely: float
    point: StatePoint
    fill: bool


class HandoffArm(CloudAnswer):
    """One answer whose tokens exits decide, and the cloud those that no exit is sure of."""

    def __init__(
        self,
        ask: GenerationRequest,
        eos_ids: frozenset[int],
        replicas: Replicas,
        device: ExitingDecoder,
        handoff: HandoffBundle,
        terms: HandoffSettings,
        alone: Callable[[list[int]], Token | None] | None,
    ) -> None:
        """`alone` as for CloudAnswer."""
        super().__init__(ask, eos_ids, replicas, alone, handoff.fingerprint)
        self._device, self._handoff, self._terms = device, handoff, terms
        self._sent = 0  # tokens whose rows are on their way, or there
        self._decided: list[int] = []  # positions whose rows the cloud was asked by, rising
        self._rounds: deque[int] = deque()  # under way: where in the text each ends

    def _with_cloud(self, link: Link) -> Iterator[Token]:
        conversation: GenerateStream | None = None
        try:
            while not self._finished:
                choice = self._device.choose(self._text, self._terms.likely)
                sure = choice.likely >= self._terms.likely
                if conversation is None and not sure:
                    conversation = link.open_generate_stream()
                    self._reopened = None
                    self._open(conversation, link, self._seat.held if self._seat.target == link.target else 0)
                token = self._token(choice) if sure else None
                if conversation is not None:
                    token = self._shared(conversation, link, token)
                if token is not None:
                    self._add(token)
                    yield token
        finally:
            if conversation is not None:
                self._end(conversation, link)

    def _shared(self, conversation: GenerateStream, link: Link, token: Token | None) -> Token | None:
        """`token`, with rows sent in the background, or the cloud's where there is none; None: ask again."""
        try:
            if token is None:
                return self._completed(conversation, link)
            if len(self._text) - self._sent >= BACKGROUND_ROWS:
                self._send_rows(conversation, link)
        except ContextGone:
            self._check_reopened()
            self._open(conversation, link, 0)
        return token

    def _open(self, conversation: GenerateStream, link: Link, held: int) -> None:
        self._rounds.clear()
        self._sent = held
        opening = Opening(
            model=self._replicas.fingerprint,
            session=self._seat.session,
            start=held,
            tokens=(),
            crc32=checksum(self._text[:held]),
            sampling=self._ask.sampling,
            logprobs=self._ask.top_logprobs,
            handoff=self._handoff.fingerprint,
            rate=self._terms.point.rate,
            context_rate=self._terms.point.context_rate,
            prefill_layers=self._handoff.depth if self._terms.fill else 0,
        )
        conversation.open(opening)
        self._seat.target, self._seat.held = link.target, held

    def _completed(self, conversation: GenerateStream, link: Link) -> Token:
        """The token that the cloud completes. Raises ContextGone, and ServiceError for an answer that it cannot be."""
        self._sent = min(self._sent, len(self._text) - 1)  # the row that decides it goes with the question
        self._send_rows(conversation, link, ask=True)
        while len(self._rounds) > 1:
            self._take(conversation, link)
        committed = self._take(conversation, link)
        if len(committed.tokens) != 1:
            raise ServiceError("the cloud answered what it was not asked")
        self.tally.rounds += 1
        self.tally.passes += 1
        self.tally.prefill_passes -= 1
        return cloud_token(committed.tokens[0], "cloud", committed.logprobs[0] if committed.logprobs else None)

    def _send_rows(self, conversation: GenerateStream, link: Link, ask: bool = False) -> None:
        """Send the rows of all tokens that have not been sent, and maybe ask what follows them."""
        rows_NH = self._device.hidden_states(self._sent)
        before = [position for position in self._decided if position >= self._sent]  # the cloud has lost these
        if ask and self._decided[-1:] != [len(self._text) - 1]:
            self._decided.append(len(self._text) - 1)
        for start in range(0, len(rows_NH), MAX_STATES):
            states = self._coded(rows_NH[start : start + MAX_STATES])
            ids, last = self._text[self._sent : self._sent + len(states)], start + MAX_STATES >= len(rows_NH)
            decided = tuple(position - self._sent for position in before if position - self._sent in range(len(states)))
            conversation.send(Round(self._sent, tuple(ids), int(ask and last), tuple(states), decided))
            self._sent += len(states)
            self._rounds.append(self._sent)
            if not last:  # one at a time: a service holds few of them
                self._take(conversation, link)

    def _coded(self, rows_NH: Floats) -> list[bytes]:
        """States of the tokens that follow those sent. The first of a text is none: the cloud makes it itself."""
        codec, point, first = self._handoff.state_codec, self._terms.point, int(self._sent == 0)
        embedded_MH = self._device.embed(self._text[self._sent + first - 1 : self._sent + len(rows_NH)])
        states = [b""] * first
        for decides, run in groupby(range(first, len(rows_NH)), lambda index: self._sent + index in self._decided):
            places = list(run)
            around_MH = embedded_MH[places[0] - first : places[-1] - first + 2]
            states += codec.encode(rows_NH[places], around_MH, point.rate if decides else point.context_rate)
        return states

    def _take(self, conversation: GenerateStream, link: Link) -> Committed:
        committed = self._receive(conversation, link)
        if not self._rounds:
            raise ServiceError("the cloud answered what it was not asked")
        self._seat.held = self._rounds.popleft()
        self.tally.cloud_s += committed.queue_s + committed.compute_s
        self.tally.prefill_passes += committed.passes
        self.tally.cached += committed.held
        return committed

    def _token(self, choice: Choice) -> Token:
        return edge_token(choice.logits_V, self._ask, len(self._text))
