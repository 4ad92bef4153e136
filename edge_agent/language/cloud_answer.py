"""One answer with a cloud, whichever arm: attempts at one cloud after another, what is counted, how long to wait.

What a cloud holds of the text is a cache. Knows nothing about gRPC, drafts or exits.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field, replace

from isthmus.edge_agent.language.replicas import Replicas
from isthmus.edge_agent.language.request import AnswerSequence, Arm, GenerationRequest, Span, Token
from isthmus.edge_agent.transport.generate_stream import GenerateStream
from isthmus.edge_agent.transport.link import Link
from isthmus.models.errors import DeadlineExceeded, IsthmusError, LinkDown, LinkError, ServiceError
from isthmus.models.messages import Committed

ALIVE_S = 0.7  # a cloud that does not answer a Describe within this is lost
PATIENCE_S = 120.0  # for one answer of a cloud that is alive: a long prompt behind many others
ATTEMPTS = 4  # conversations in a row without a token; then the cloud counts as lost

ASKED = "asked for"


@dataclass
class GenerationStats:
    """Counts for the Summary."""

    accepted: int = 0
    rejected: int = 0
    rounds: int = 0
    passes: int = 0  # that decide tokens
    prefill_passes: int = 0  # that only read
    opening_bytes: int = 0
    cached: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    cloud_s: float = 0.0
    rtt_s: float | None = None
    degraded: bool = False
    why: str = ASKED
    spans: list[Span] = field(default_factory=list)  # where several arms took turns

    def count(self, arm: Arm, why: str) -> None:
        """One more token, by this arm, for this reason if it is the first of a row."""
        if self.spans and self.spans[-1].arm == arm:
            self.spans[-1] = replace(self.spans[-1], tokens=self.spans[-1].tokens + 1)
        else:
            self.spans.append(Span(arm, 1, why))

    def add(self, part: GenerationStats) -> None:
        """Count what another arm spent on its part of the answer."""
        if not self.bytes_up:
            self.cached = part.cached  # later parts find what this answer left there
        self.accepted += part.accepted
        self.rejected += part.rejected
        self.rounds += part.rounds
        self.passes += part.passes
        self.prefill_passes += part.prefill_passes
        self.opening_bytes += part.opening_bytes
        self.bytes_up += part.bytes_up
        self.bytes_down += part.bytes_down
        self.cloud_s += part.cloud_s
        self.rtt_s = part.rtt_s if part.rtt_s is not None else self.rtt_s
        self.degraded = self.degraded or part.degraded
        self.why = part.why if part.why != ASKED else self.why


class CloudAnswer(AnswerSequence, ABC):
    """`tokens` yields one answer, once; `tally` may be read at any time."""

    def __init__(
        self,
        ask: GenerationRequest,
        eos_ids: frozenset[int],
        replicas: Replicas,
        alone: Callable[[list[int]], Token | None] | None,
        kind: bytes = b"",
    ) -> None:
        """`alone` makes a token when no cloud is left, or None for a text that it cannot hold; None: wait for a cloud.

        `kind` tells sessions in the cloud apart that cannot take over each other's state.
        """
        super().__init__(ask, eos_ids)
        self._replicas, self._alone = replicas, alone
        self._reopened: int | None = None  # tokens made when the cloud last had to be brought everything again
        self._seat = replicas.seat(ask.prompt, kind)
        self.tally = GenerationStats()

    def tokens(self) -> Generator[Token, None, None]:
        """Committed tokens. Raises what the cloud says of a wrong request, and LinkDown when nobody can go on."""
        attempts, failure = 0, None
        while not self._finished:
            made = self._made
            link = self._replicas.best() if attempts < ATTEMPTS else None
            if link is None:
                yield from self._without_cloud(failure if attempts == ATTEMPTS else None)
            else:
                failure = yield from self._attempt(link)
            if self._made > made:
                attempts = 0
            elif link is not None:
                attempts += 1

    def prepare(self) -> None:
        """Have a cloud work for the first token already, while the device does something else; not all arms can."""

    @property
    def answered(self) -> bool:
        """Whether the first token of what was prepared is there, or will not come."""
        return True

    def close(self) -> None:
        """Remember the session, so that the next turn of a chat finds its state in the cloud."""
        self._replicas.keep(self._seat, self._text)

    @abstractmethod
    def _with_cloud(self, link: Link) -> Iterator[Token]:
        """As many tokens as this cloud gives. Raises LinkError, ServiceError when it is lost."""

    def _attempt(self, link: Link) -> Generator[Token, None, LinkError | ServiceError | None]:
        """As many tokens as this cloud gives; what ended it too early."""
        try:
            yield from self._with_cloud(link)
        except (LinkError, ServiceError) as error:
            self.tally.why = f"{error}; went on with what was committed"
            self._seat.held = 0  # what is left there of the session is not known
            self._replicas.lost(link, error)
            return error
        return None

    def _check_reopened(self) -> None:
        """Raises LinkDown when bringing everything again did not help."""
        if self._reopened == self._made:
            raise LinkDown("the cloud keeps losing this session")
        self._reopened = self._made

    def _receive(self, conversation: GenerateStream, link: Link) -> Committed:
        """The next answer of a cloud that is alive, however slow. Raises ContextGone when it lacks the session."""
        patience_s = time.monotonic() + PATIENCE_S
        while True:
            try:
                return conversation.receive()
            except DeadlineExceeded:
                if time.monotonic() > patience_s or not link.alive(ALIVE_S):
                    raise LinkDown("the cloud does not answer any more") from None

    def _end(self, conversation: GenerateStream, link: Link) -> None:
        """Close a conversation, and count what it carried."""
        conversation.close()
        self.tally.bytes_up += conversation.bytes_up
        self.tally.opening_bytes += conversation.opening_bytes
        self.tally.bytes_down += conversation.bytes_down
        self.tally.rtt_s = link.estimate.rtt_s

    def _without_cloud(self, failure: IsthmusError | None) -> Iterator[Token]:
        """Go on alone, a token at least, until a cloud can be used again; or wait for one. Raises LinkDown.

        `failure` ends the answer instead of waiting: clouds are there, and fail.
        """
        while not self._finished:
            token = self._alone(self._text) if self._alone else None
            if token is None:
                if failure is not None:
                    raise failure
                self._replicas.wait()
                return
            if not self.tally.degraded and self.tally.why == ASKED:
                self.tally.why = "no cloud answers"
            self.tally.degraded = True
            self._add(token)
            yield token
            if self._replicas.best() is not None:
                return
