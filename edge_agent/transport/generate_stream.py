"""One `Generate` stream: openings and rounds go out, committed tokens come in. `Link` opens it.

Knows nothing about drafting or policy.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple

import grpc

from isthmus.edge_agent.transport.channel import GRPC_PREFIX_BYTES, rpc_error
from isthmus.edge_agent.transport.cloud_stub import CloudStub
from isthmus.models.errors import CallerError, ContextGone, DeadlineExceeded, IsthmusError, LinkDown, PeerError
from isthmus.models.messages import Committed, Opening, Round
from isthmus.protos import limits, wire_session
from isthmus.protos.isthmus.v1 import isthmus_pb2 as pb

RECEIVE_TIMEOUT_S = 1.0  # a caller that has waited this long checks whether the cloud is alive


class Traffic(NamedTuple):
    """Of a stream, with the message that is to be sent: bytes so far, rounds, and the most that may still come."""

    up_bytes: int
    down_bytes: int
    rounds: int
    replies_due: int
    tokens_due: int


BeforeSending = Callable[[Traffic], None]


def allow(traffic: Traffic) -> None:
    """Anything may be sent."""


@dataclass(frozen=True, slots=True)
class StreamObservation:
    """Bytes sent and transit time of one round. `elapsed_s` leaves out the cloud's own time; None if unknown."""

    up_bytes: int
    elapsed_s: float | None


class GenerateStream:
    """The first failure ends the stream, and every later call raises it."""

    def __init__(
        self,
        stub: CloudStub,
        vocab: int,
        on_reply: Callable[[StreamObservation | IsthmusError], None],
        before_sending: BeforeSending = allow,
    ) -> None:
        """`on_reply` gets an observation of each reply, and a failure of the stream, in the thread that receives it.

        before_sending: called for each message; what it raises keeps the message from being sent.
        """
        self._before_sending = before_sending
        self._vocab = vocab
        self._on_reply = on_reply
        self._outgoing: SimpleQueue[pb.GenerateRequest | None] = SimpleQueue()
        self._incoming: SimpleQueue[tuple[float, pb.GenerateResponse | IsthmusError]] = SimpleQueue()  # arrived when
        self._sent: deque[tuple[float, int]] = deque()  # time and bytes of each round without a reply
        self._unanswered = 0  # bytes of an opening, counted with the round that follows it
        self._failure: IsthmusError | None = None
        self._rounds_due = self._tokens_due = 0  # replies to rounds, and tokens that the cloud decodes after a round
        self._rounds = self._longest = 0  # rounds sent, and the most tokens of one's draft
        self._active_s = time.monotonic()  # when a message was last sent or received
        self.retired = False
        self.bytes_up = self.bytes_down = self.opening_bytes = 0  # bytes_up includes openings
        self._call: Any = stub.Generate(self._requests())
        threading.Thread(target=self._read, name="isthmus-generate-stream", daemon=True).start()

    def open(self, opening: Opening) -> None:
        """Send the session and its tokens. Rounds may follow without waiting for a reply."""
        size = self._send(wire_session.pack_opening(opening))
        self.opening_bytes += size
        self._unanswered = size
        self._sent.clear()
        self._rounds_due = self._tokens_due = 0

    def send(self, round_: Round) -> None:
        """Send one round."""
        size = self._send(wire_session.pack_round(round_), round_)
        self._rounds_due, self._tokens_due = self._rounds_due + 1, round_.extend
        self._sent.append((time.monotonic(), size + self._unanswered))
        self._unanswered = 0

    @property
    def answered(self) -> bool:
        """Whether `receive` would return or raise at once."""
        return self._failure is not None or not self._incoming.empty()

    def poll(self) -> Committed | None:
        """The next reply if it has arrived, else None. Raises like `receive`."""
        return self._next(0.0)

    def receive(self, timeout_s: float = RECEIVE_TIMEOUT_S) -> Committed:
        """Wait for the next reply. Raises DeadlineExceeded, LinkDown, or the error that the cloud replied with.

        After DeadlineExceeded, and after an error in a reply, the stream may be used further.
        """
        committed = self._next(timeout_s)
        if committed is None:
            raise DeadlineExceeded(f"no answer from the cloud within {timeout_s:.1f} s")
        return committed

    def retire_idle(self) -> None:
        """Half-close a stream over which nothing is due, so that no pings go over it.

        What is sent later raises ContextGone: the session is to be opened over another stream.
        """
        if not self.due and time.monotonic() - self._active_s > limits.IDLE_STREAM_S:
            self.retired = True
            self._outgoing.put(None)

    def close(self) -> None:
        """Cancel the stream; the cloud stops its work for it."""
        self._outgoing.put(None)
        self._call.cancel()

    def _next(self, timeout_s: float) -> Committed | None:
        if self._failure is not None:
            raise self._failure
        try:
            arrived_s, message = self._incoming.get(timeout_s > 0, timeout_s or None)
        except Empty:
            return None
        if isinstance(message, IsthmusError):
            self._failure = message
            self._on_reply(message)
            raise message
        committed = wire_session.unpack_committed(message, self._vocab)
        self._on_reply(self._observe(committed, arrived_s))
        return committed

    def _observe(self, committed: Committed, arrived_s: float) -> StreamObservation:
        if committed.extension or not self._sent:
            return StreamObservation(0, None)
        sent_s, size = self._sent.popleft()
        transit_s = arrived_s - sent_s - committed.queue_s - committed.compute_s
        alone = not self._sent and committed.tokens  # queued after another round, or stale: the transit time is unknown
        return StreamObservation(size, max(transit_s, 0.0) if alone else None)

    @property
    def due(self) -> bool:
        """Whether replies may be on the way."""
        return self._rounds_due > 0 or self._tokens_due > 0

    def _send(self, message: pb.GenerateRequest, round_: Round | None = None) -> int:
        if self._failure is not None:
            raise self._failure
        if self.retired:
            raise ContextGone("the stream was idle and is closed")
        size = message.ByteSize() + GRPC_PREFIX_BYTES
        self._before_sending(self._traffic(size, round_))
        self._active_s = time.monotonic()
        self._outgoing.put(message)
        self.bytes_up += size
        return size

    def _traffic(self, size: int, round_: Round | None) -> Traffic:
        """With a message of so many bytes; an opening ends what was due before it."""
        if round_ is None:
            return Traffic(self.bytes_up + size, self.bytes_down, self._rounds, 0, 0)
        self._rounds, self._longest = self._rounds + 1, max(self._longest, len(round_.draft))
        rounds_due, tokens_due = self._rounds_due + 1, max(self._tokens_due, round_.extend)
        tokens = rounds_due * (1 + self._longest) + tokens_due
        return Traffic(self.bytes_up + size, self.bytes_down, self._rounds, rounds_due + tokens_due, tokens)

    def _requests(self) -> Iterator[pb.GenerateRequest]:
        while (message := self._outgoing.get()) is not None:
            yield message

    def _count(self, response: pb.GenerateResponse) -> None:
        """What is due after a response, and its bytes."""
        self._active_s = time.monotonic()
        self.bytes_down += response.ByteSize() + GRPC_PREFIX_BYTES
        if response.HasField("error"):
            self._rounds_due = self._tokens_due = 0
        elif response.extension:
            self._tokens_due -= len(response.tokens)
        else:
            self._rounds_due -= 1
            self._tokens_due -= max(len(response.tokens) - 1, 0)  # tokens that a grammar forced after the first

    def _read(self) -> None:
        error: IsthmusError = LinkDown("the cloud ended the stream")
        try:
            for response in self._call:
                self._count(response)
                self._incoming.put((time.monotonic(), response))
        except grpc.RpcError as failure:
            error = rpc_error(failure)
            if isinstance(error, DeadlineExceeded | ContextGone):  # in a reply these mean that the stream goes on
                error = LinkDown(str(error))
            elif isinstance(error, CallerError):  # faults of a request are told in replies
                error = PeerError(str(error))
        self._outgoing.put(None)
        self._incoming.put((time.monotonic(), error))
