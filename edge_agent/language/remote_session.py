"""One answer's session in the cloud: which replica holds it, opening and reopening it, failover, bytes.

    chosen replica -> open (tokens that it lacks) -> rounds up, replies down
        session lost there    -> ContextGone; reopen brings everything again
        replica lost          -> the next one, from the committed tokens; none left -> the fallback, or wait

Knows nothing about drafts, exits or gRPC.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence

from isthmus.edge_agent.language.charges import FREE, StreamCharges, Tariff
from isthmus.edge_agent.language.replicas import Replicas, SessionHandle
from isthmus.edge_agent.language.request import Token
from isthmus.edge_agent.language.sequence import AnswerSequence
from isthmus.edge_agent.language.stats import GenerationStats
from isthmus.edge_agent.transport.generate_stream import GenerateStream
from isthmus.edge_agent.transport.language_link import LanguageLink
from isthmus.models.errors import (
    AnswerCancelled,
    DeadlineExceeded,
    IsthmusError,
    LinkDown,
    LinkError,
    OverBudget,
    ServiceError,
)
from isthmus.models.messages import Committed, Opening, Round
from isthmus.protos.wire_session import checksum

ALIVE_S = 0.7  # a replica that does not answer a Describe within this is lost
PATIENCE_S = 120.0  # for one reply of a replica that is alive: a long prompt after many others
FALLBACK_PATIENCE_S = 10.0  # where the local model can answer: it reads a full context and writes some in that time
ATTEMPTS = 4  # streams in a row without a token; then the cloud counts as lost

Fallback = Callable[[Sequence[int]], Token | None]  # the local model's next token; None: the text is too long for it
MakeOpening = Callable[[bytes, bytes, int], Opening]  # fingerprint of the model, session id, tokens held there


def token_opening(sequence: AnswerSequence, prefill_layers: int) -> MakeOpening:
    """How a session of tokens is opened."""
    request = sequence.request

    def opening(model: bytes, session: bytes, held: int) -> Opening:
        return Opening(
            model=model,
            session=session,
            start=held,
            tokens=tuple(sequence.tokens[held:]),
            crc32=checksum(sequence.tokens),
            sampling=request.sampling,
            logprobs=request.top_logprobs,
            prefill_layers=prefill_layers,
            answer_start=sequence.answer_start,
        )

    return opening


class RemoteSession:
    """Open while an answer needs it; `close` remembers it for the next turn of a chat."""

    def __init__(
        self,
        replicas: Replicas,
        sequence: AnswerSequence,
        stats: GenerationStats,
        make_opening: MakeOpening,
        kind: bytes = b"",
        cancelled: threading.Event | None = None,
        *,
        tariff: Tariff = FREE,
    ) -> None:
        """`kind` tells sessions apart whose KV caches cannot be reused for each other.
        A wait for the cloud ends with AnswerCancelled soon after `cancelled` is set.
        """
        self._replicas, self._sequence, self._stats = replicas, sequence, stats
        self._make_opening = make_opening
        self._handle: SessionHandle = replicas.acquire(sequence.tokens, kind)
        self._cancelled = cancelled or threading.Event()
        self._link: LanguageLink | None = None  # of the stream, or of the attempt that may open one
        self._stream: GenerateStream | None = None
        self._tariff, self._charges = tariff, StreamCharges(tariff, 0)
        self._over: OverBudget | None = None  # for the rest of this answer
        self._closed = False
        self._patience_s = PATIENCE_S
        self._stalled: list[LanguageLink] = []  # alive, but without a reply in time: not tried again for this answer
        self._reopened: int | None = None  # tokens generated when everything last had to be brought again

    @property
    def connected(self) -> bool:
        return self._stream is not None

    @property
    def answered(self) -> bool:
        """Whether `receive` would return or raise at once; True without a stream too."""
        return self._stream is None or self._stream.answered

    @property
    def rtt_s(self) -> float:
        """Round trip to the replica in use."""
        return self._used.estimate.rtt_s

    def tokens(
        self, remote: Callable[[], Iterator[Token]], fallback: Fallback | None, done: Callable[[], bool]
    ) -> Generator[Token, None, None]:
        """Tokens of `remote`, by one replica after another, and of `fallback` while there is none, until `done`.

        Raises what the cloud says of an invalid request, LinkDown when nobody can go on, and OverBudget when
        nothing more may be spent. Without a fallback it waits for a replica.
        """
        attempts, failure = 0, None
        self._patience_s = FALLBACK_PATIENCE_S if fallback else PATIENCE_S
        while not done():
            generated = self._sequence.generated
            link = self._best() if attempts < ATTEMPTS else None
            if link is None:
                final = self._over or (failure if attempts == ATTEMPTS else None)
                yield from self._fall_back(fallback, final, done)
            else:
                failure = yield from self._attempt(link, remote)
            if self._sequence.generated > generated:
                attempts = 0
            elif link is not None:
                attempts += 1

    def prepare(self) -> bool:
        """Choose a replica before `tokens` does; False when there is none."""
        if not self.connected:
            self._link = self._best()
        return self._link is not None

    def open(self) -> None:
        """Name the session and bring the tokens that the replica lacks; a stream that is open is used again."""
        self._leave_retired()
        if self._stream is None:
            self._reopened = None
            self._stream = self._new_stream()
        held = self._handle.held if self._handle.target == self._used.target else 0
        self._send_opening(held)

    def reopen(self) -> None:
        """Bring everything again after ContextGone. Raises LinkDown when that did not help the last time."""
        if self._reopened == self._sequence.generated:
            raise LinkDown("the cloud keeps losing this session")
        self._reopened = self._sequence.generated
        if self._leave_retired():
            self._stream = self._new_stream()
        self._send_opening(0)

    @property
    def held(self) -> int:
        """Tokens that the replica holds, as far as it has confirmed."""
        return self._handle.held

    @held.setter
    def held(self, tokens: int) -> None:
        self._handle.held = tokens

    def send(self, round_: Round) -> None:
        """Send a round over the open stream. Raises ContextGone if that was closed for want of use."""
        self._open_stream.send(round_)

    def poll(self) -> Committed | None:
        """A reply that is there already. Raises ContextGone when the replica lacks the session."""
        committed = self._open_stream.poll()
        if committed is not None:
            self._charges.replied(committed)
        return committed

    def receive(self) -> Committed:
        """The next reply of a replica that is alive, however slow. Raises ContextGone when it lacks the session."""
        until_s = time.monotonic() + self._patience_s
        while True:
            try:
                committed = self._open_stream.receive()
                self._charges.replied(committed)
                return committed
            except DeadlineExceeded:
                self._charges.waits()
                if self._cancelled.is_set():
                    raise AnswerCancelled("the answer was given up") from None
                if not self._used.alive(ALIVE_S):
                    raise LinkDown("the cloud does not answer any more") from None
                if time.monotonic() > until_s:
                    self._stalled.append(self._used)
                    raise LinkDown(f"the cloud is alive, but did not reply within {self._patience_s:.0f} s") from None

    def disconnect(self) -> None:
        """Close the stream, if one is open, and count what it carried."""
        stream, self._stream = self._stream, None
        if stream is None:
            return
        due = stream.due
        stream.close()
        self._charges.close(stream.bytes_up, stream.bytes_down, due=due)
        self._stats.bytes_up += stream.bytes_up
        self._stats.opening_bytes += stream.opening_bytes
        self._stats.bytes_down += stream.bytes_down
        self._stats.rtt_s = self._used.estimate.rtt_s

    def close(self) -> None:
        """Disconnect, and remember the session for the next turn, which may use it at once."""
        self.disconnect()
        if not self._closed:
            self._closed = True
            self._replicas.release(self._handle, self._sequence.tokens)

    @property
    def _used(self) -> LanguageLink:
        assert self._link is not None  # set before anything is sent
        return self._link

    @property
    def _open_stream(self) -> GenerateStream:
        assert self._stream is not None  # rounds follow an opening
        return self._stream

    def _best(self) -> LanguageLink | None:
        """The replica to use now; None: none can go on with the answer, or nothing more may be spent on it."""
        if self._over is not None:
            return None
        return self._replicas.best(self._stalled, self._sequence)

    def _new_stream(self) -> GenerateStream:
        self._charges = StreamCharges(self._tariff, self._sequence.request.top_logprobs or 0)
        return self._used.open_generate_stream(self._replicas.pin(self._sequence).vocab, self._charges.before_sending)

    def _leave_retired(self) -> bool:
        """Disconnect from a stream that was closed for want of use. Returns whether it was."""
        retired = self._stream is not None and self._stream.retired
        if retired:
            self.disconnect()
        return retired

    def _send_opening(self, held: int) -> None:
        self._open_stream.open(self._make_opening(self._sequence.cloud_model, self._handle.session, held))
        self._handle.target, self._handle.held = self._used.target, held

    def _attempt(
        self, link: LanguageLink, remote: Callable[[], Iterator[Token]]
    ) -> Generator[Token, None, LinkError | ServiceError | OverBudget | None]:
        """As many tokens as one replica gives; what ended it too early."""
        if not self.connected:
            self._link = link
        self._stats.fell_back = False
        try:
            yield from remote()
        except OverBudget as error:
            self._over, self._stats.problem = error, str(error)
            self.disconnect()
            return error
        except (LinkError, ServiceError) as error:
            self._stats.problem = f"{error}; went on with what was committed"
            self._handle.held = 0  # what is left there of the session is not known
            self.disconnect()
            self._replicas.record_failure(self._used, error)
            return error
        return None

    def _fall_back(
        self, fallback: Fallback | None, failure: IsthmusError | None, done: Callable[[], bool]
    ) -> Iterator[Token]:
        """Go on without the cloud, a token at least, until a replica can be used; or wait for one. Raises LinkDown.

        `failure` ends the answer instead of waiting: replicas are there, and fail.
        """
        while not done():
            token = fallback(self._sequence.tokens) if fallback else None
            if token is None:
                if failure is not None:
                    raise failure
                self._stalled.clear()  # there is no other way left than to be patient
                self._patience_s = PATIENCE_S
                self._replicas.wait(self._cancelled, self._sequence)
                return
            self._stats.degrade("no cloud answers")
            self._stats.fell_back = True
            self._sequence.append(token.id)
            yield token
            if self._best() is not None:
                return
