"""The arm `handoff`: the device runs the lower layers, and commits what its exits are confident of.

    text -> lower layers -> an exit is confident: the token is made here
                            otherwise: hidden states of all tokens not sent yet go up, and the cloud completes this one

Hidden states of tokens that were made here go up in the background once the cloud has been queried. When the cloud is
lost the device goes on through all layers. Knows nothing about text, only tokens; nothing about gRPC.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from itertools import groupby

from isthmus.edge_agent.config import LanguageConfig
from isthmus.edge_agent.language.local_model import LocalSession
from isthmus.edge_agent.language.remote_session import Fallback, MakeOpening, RemoteSession
from isthmus.edge_agent.language.request import Token, cloud_token
from isthmus.edge_agent.language.sequence import AnswerSequence
from isthmus.edge_agent.language.stats import GenerationStats
from isthmus.edge_agent.policy.arms import HandoffEstimate
from isthmus.models.errors import ContextGone, InvalidInput, InvalidReply
from isthmus.models.language.architecture import LlamaConfig
from isthmus.models.language.handoff.bundle import HandoffBundle
from isthmus.models.language.handoff.manifest import HandoffManifest, StatePoint, least_likely
from isthmus.models.language.packing import Floats
from isthmus.models.messages import Committed, Opening, Round
from isthmus.protos.limits import MAX_STATES
from isthmus.protos.wire_session import checksum

BACKGROUND_STATES = 8  # hidden states that go up without a query
CODING_LOSS = 0.005  # of the cloud's choices, at most, where the owner names no operating point


@dataclass(frozen=True)
class HandoffSettings:
    """How the device uses its exits.

    likely: confidence from which an exit is believed. point: how hidden states are coded. fill: whether the cloud may
    approximate the KV cache of tokens that it does not decode.
    """

    likely: float
    point: StatePoint
    fill: bool


class HandoffArm:
    """One answer whose tokens exits decode, and the cloud those that no exit is confident of."""

    def __init__(
        self,
        sequence: AnswerSequence,
        session: RemoteSession,
        stats: GenerationStats,
        local: LocalSession,
        handoff: HandoffBundle,
        settings: HandoffSettings,
        fallback: Fallback | None,
    ) -> None:
        """`fallback` generates while no replica can be used; None: wait for one."""
        self._sequence, self._session, self._stats, self._fallback = sequence, session, stats, fallback
        self._local, self._handoff, self._settings = local, handoff, settings
        self._sent = 0  # tokens whose hidden states are on their way, or there
        self._decoded_from: list[int] = []  # positions whose hidden states the cloud decoded a token from, rising
        self._in_flight: deque[tuple[int, int]] = deque()  # of each round, its position and the tokens it completes

    def tokens(self) -> Generator[Token, None, None]:
        """Committed tokens. Raises as RemoteSession.tokens."""
        try:
            yield from self._session.tokens(self._remote, self._fallback, lambda: self._sequence.finished)
        finally:
            self._session.disconnect()

    def _remote(self) -> Iterator[Token]:
        sequence, likely = self._sequence, self._settings.likely
        while not sequence.finished:
            token = self._own(likely)
            if not self._session.connected and token is None:
                self._open()
            if self._session.connected:
                token = self._share(token)
            if token is not None:
                sequence.append(token.id)
                yield token

    def _own(self, likely: float) -> Token | None:
        """The next token, if the grammar forces it or an exit is confident."""
        sequence = self._sequence
        if (forced := sequence.forced(sequence.tokens)) is not None:
            return forced
        choice = self._local.exit(sequence.tokens, likely)
        return sequence.choose(choice.logits_V, sequence.tokens) if choice.likely >= likely else None

    def _open(self) -> None:
        self._in_flight.clear()
        self._session.open()
        self._sent = self._session.held

    def _share(self, token: Token | None) -> Token | None:
        """`token`, with hidden states sent in the background, or else the cloud's; None: ask again."""
        try:
            if token is None:
                return self._complete()
            if len(self._sequence) - self._sent >= BACKGROUND_STATES:
                self._send_states()
        except ContextGone:
            self._in_flight.clear()
            self._session.reopen()
            self._sent = 0
        return token

    def _complete(self) -> Token:
        """The token that the cloud completes. Raises ContextGone, and InvalidReply for one that it cannot be."""
        self._sent = min(self._sent, len(self._sequence) - 1)  # the hidden state that decides goes with the query
        self._send_states(query=True)
        while len(self._in_flight) > 1:
            self._receive()
        committed = self._receive()
        if len(committed.tokens) != 1:
            raise InvalidReply("the cloud answered what it was not asked")
        self._stats.rounds += 1
        self._stats.passes += 1
        self._stats.prefill_passes -= 1
        return cloud_token(committed.tokens[0], "cloud", committed.logprobs[0] if committed.logprobs else None)

    def _send_states(self, query: bool = False) -> None:
        """Send the hidden states of all tokens that were not sent yet, and maybe query what follows them."""
        tokens = self._sequence.tokens
        states_NH = self._local.hidden_states(tokens, self._sent)
        before = [position for position in self._decoded_from if position >= self._sent]  # the cloud has lost these
        if query and self._decoded_from[-1:] != [len(tokens) - 1]:
            self._decoded_from.append(len(tokens) - 1)
        for start in range(0, len(states_NH), MAX_STATES):
            states = self._encode(states_NH[start : start + MAX_STATES])
            ids, last = tokens[self._sent : self._sent + len(states)], start + MAX_STATES >= len(states_NH)
            again = tuple(place - self._sent for place in before if place - self._sent in range(len(states)))
            self._session.send(Round(self._sent, tuple(ids), int(query and last), tuple(states), again))
            self._in_flight.append((self._sent, self._sent + len(states)))
            self._sent += len(states)
            if not last:  # one at a time: a service holds few of them
                self._receive()

    def _encode(self, states_NH: Floats) -> list[bytes]:
        """Coded states of the tokens after those sent. The first of a text has none: the cloud computes it itself."""
        codec, point, first = self._handoff.state_codec, self._settings.point, int(self._sent == 0)
        embedded_MH = self._local.embed(self._sequence.tokens[self._sent + first - 1 : self._sent + len(states_NH)])
        states = [b""] * first
        decides = {index for index in range(first, len(states_NH)) if self._sent + index in self._decoded_from}
        for decodes, run in groupby(range(first, len(states_NH)), decides.__contains__):
            places = list(run)
            around_MH = embedded_MH[places[0] - first : places[-1] - first + 2]
            states += codec.encode(states_NH[places], around_MH, point.rate if decodes else point.context_rate)
        return states

    def _receive(self) -> Committed:
        committed = self._session.receive()
        if not self._in_flight or committed.base != self._in_flight[0][0] or committed.accepted:
            raise InvalidReply("the cloud answered what it was not asked")
        _, self._session.held = self._in_flight.popleft()
        self._stats.count_cost(committed)
        self._stats.prefill_passes += committed.passes
        return committed


def handoff_opening(sequence: AnswerSequence, handoff: HandoffBundle, settings: HandoffSettings) -> MakeOpening:
    """How a session of hidden states is opened."""
    request = sequence.request

    def opening(model: bytes, session: bytes, held: int) -> Opening:
        return Opening(
            model=model,
            session=session,
            start=held,
            tokens=(),
            crc32=checksum(sequence.tokens[:held]),
            sampling=request.sampling,
            logprobs=request.top_logprobs,
            handoff=handoff.fingerprint,
            rate=settings.point.rate,
            context_rate=settings.point.context_rate,
            prefill_layers=handoff.depth if settings.fill else 0,
            answer_start=sequence.answer_start,
        )

    return opening


def settings_of(manifest: HandoffManifest, config: LanguageConfig) -> HandoffSettings:
    """When exits are believed and how hidden states are coded, as the owner wants it. Raises InvalidInput."""
    likely = least_likely(manifest.thresholds, config.agreement)
    return HandoffSettings(likely, point_of(manifest, config.state_point), config.fill)


def point_of(manifest: HandoffManifest, index: int | None) -> StatePoint:
    """An operating point; None: the cheapest that loses little. Raises InvalidInput for one that does not exist."""
    points = manifest.points
    if index is None:
        least = max(point.agreement for point in points) - CODING_LOSS
        return next(point for point in points if point.agreement >= least)
    if not 0 <= index < len(points):
        raise InvalidInput(f"point {index} does not exist, there are 0 to {len(points) - 1}")
    return points[index]


def estimate_of(manifest: HandoffManifest, settings: HandoffSettings, config: LlamaConfig) -> HandoffEstimate:
    """What handoff is worth with these settings, as the bundle measured it."""
    found = min(manifest.thresholds, key=lambda threshold: abs(threshold.confidence - settings.likely))
    coverage = found.coverage if settings.likely <= 1 else 0.0
    quality = coverage * found.agreement + (1 - coverage) * settings.point.agreement
    return HandoffEstimate(quality, 1 - coverage, 1 - manifest.depth / config.layers, settings.point.mean_bytes)
