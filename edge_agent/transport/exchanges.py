"""Requests for photos and their replies over one `InferStream` after another, each sent once more after a goodbye.

Knows nothing about estimates or the circuit breaker.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass

from isthmus.edge_agent.transport.channel import GRPC_PREFIX_BYTES
from isthmus.edge_agent.transport.cloud_stub import CloudStub
from isthmus.edge_agent.transport.health import Attempt
from isthmus.edge_agent.transport.infer_stream import InferStream
from isthmus.models.errors import DeadlineExceeded, Draining, LinkDown
from isthmus.models.messages import CloudReply, CloudRequest, OutputBounds, Payload
from isthmus.protos import limits, wire
from isthmus.protos.isthmus.v1 import isthmus_pb2 as pb

RETRY_LEFT_S = 0.005  # of a request's time; with less it is not sent a second time


@dataclass(frozen=True, slots=True)
class Exchange:
    """One request and its reply: bytes with our framing and gRPC's prefix, seconds on the device's clock."""

    reply: CloudReply
    up_bytes: int
    down_bytes: int
    elapsed_s: float


class Exchanges:
    """One stream at a time; a new one when that has ended. Safe to call from several threads."""

    def __init__(
        self,
        stub: CloudStub,
        fingerprint: bytes,
        expected: Sequence[int | OutputBounds],
        late: Callable[[], None],
    ) -> None:
        """`expected` of each task: see `wire.unpack_answer`. `late` is called for each reply after its deadline."""
        self._stub, self._fingerprint, self._expected, self._late = stub, fingerprint, expected, late
        self._lock = threading.Lock()
        self._stream: InferStream | None = None
        self._next_id = 0

    def exchange(
        self, payload: Payload, tasks: tuple[int, ...], attempt: Attempt, again: Callable[[], bool]
    ) -> Exchange:
        """Send a payload and wait for its reply. After a goodbye it is sent once more, if `again` and time allow it.

        Raises LinkDown, DeadlineExceeded, OverBudget, or the error that the cloud replied with.
        """
        try:
            return self._exchange(payload, tasks, attempt)
        except (LinkDown, Draining):
            if not again() or attempt.deadline_s - time.monotonic() < RETRY_LEFT_S:
                raise
        return self._exchange(payload, tasks, attempt)

    def retire_idle(self) -> None:
        """Half-close a stream that nobody uses, so that no pings go over it; the connection stays."""
        with self._lock:
            if self._stream is not None and self._stream.idle_s > limits.IDLE_STREAM_S:
                self._stream.retire(LinkDown("the stream was idle"))
                self._stream = None

    def retire(self) -> None:
        """Send nothing more over the stream; what is under way is still answered."""
        with self._lock:
            if self._stream is not None:
                self._stream.retire(LinkDown("the stream's certificate was renewed"))
                self._stream = None

    def abandon(self) -> None:
        """Send nothing more over the stream. What is under way may still be answered; the next request opens another.

        The stream may be half-open and hang.
        """
        with self._lock:
            stream, self._stream = self._stream, None
        if stream is not None:
            stream.abandon()

    def cancel(self) -> None:
        """Abort what is under way."""
        with self._lock:
            stream, self._stream = self._stream, None
        if stream is not None:
            stream.cancel()

    def _exchange(self, payload: Payload, tasks: tuple[int, ...], attempt: Attempt) -> Exchange:
        started_s = time.monotonic()
        request_id = self._request_id()
        left_s = attempt.deadline_s - started_s
        message = wire.pack_request(CloudRequest(request_id, self._fingerprint, left_s, payload, tasks))
        up_bytes = message.ByteSize() + GRPC_PREFIX_BYTES
        attempt.charge(up_bytes)
        stream, future = self._send(message)
        attempt.sent(up_bytes)
        try:
            response = future.result(max(attempt.deadline_s - time.monotonic(), 0.001))
        except FutureTimeout as error:
            raise DeadlineExceeded(f"no answer from the cloud within {1000 * left_s:.0f} ms") from error
        finally:
            stream.give_up(request_id)  # without effect after a reply
        attempt.replied = True
        elapsed_s = time.monotonic() - started_s
        reply = wire.unpack_answer(response, [self._expected[task] for task in tasks])
        return Exchange(reply, up_bytes, response.ByteSize() + GRPC_PREFIX_BYTES, elapsed_s)

    def _request_id(self) -> int:
        with self._lock:
            self._next_id = self._next_id % limits.MAX_REQUEST_ID + 1
            return self._next_id

    def _send(self, message: pb.InferRequest) -> tuple[InferStream, Future[pb.InferResponse]]:
        """Send on the open stream, or on a new one if that has ended. Raises what ended the new one, if it has."""
        with self._lock:
            if self._stream is not None and self._stream.age_s > limits.MAX_STREAM_S:
                self._stream.retire(LinkDown("the stream was old"))
            future = self._stream.send(message) if self._stream else None
            if self._stream is None or future is None:
                self._stream = InferStream(self._stub, self._late)
                future = self._stream.send(message)
            if future is None:
                raise self._stream.ended or LinkDown("the stream to the cloud ended")
            return self._stream, future
