"""One `Generate` stream: openings and rounds go out, what the cloud committed comes in. Used by `link` alone to open.

Knows nothing about drafts or policy.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any

import grpc

from isthmus.models.errors import ContextGone, DeadlineExceeded, IsthmusError, LinkDown
from isthmus.models.messages import Committed, Opening, Round
from isthmus.protos import status, wire_session
from isthmus.protos.isthmus.v1 import isthmus_pb2 as pb
from isthmus.protos.isthmus.v1 import isthmus_pb2_grpc as pb_grpc

ANSWER_S = 1.0  # after so long without an answer it is time to ask whether the cloud is alive
GRPC_PREFIX_BYTES = 5  # flag and length before each message


@dataclass(frozen=True, slots=True)
class StreamObservation:
    """What an answer says of the link: `elapsed_s` without the cloud's own time; None when it says nothing."""

    up_bytes: int
    elapsed_s: float | None


class GenerateStream:
    """Ends with the first failure, which every later call raises."""

    def __init__(
        self,
        stub: pb_grpc.IsthmusStub,
        vocab: int,
        on_reply: Callable[[StreamObservation | IsthmusError], None],
    ) -> None:
        """`on_reply` is told of each answer and of a failure of the link, in whatever thread takes the answer."""
        self._vocab = vocab
        self._on_reply = on_reply
        self._outgoing: SimpleQueue[pb.GenerateRequest | None] = SimpleQueue()
        self._incoming: SimpleQueue[tuple[float, pb.GenerateResponse | IsthmusError]] = SimpleQueue()  # since when
        self._sent: deque[tuple[float, int]] = deque()  # when, and how many bytes, for each round not yet answered
        self._unanswered = 0  # bytes of an opening that the next answer answers too
        self._failure: IsthmusError | None = None
        self.bytes_up = self.bytes_down = self.opening_bytes = 0  # openings are part of what goes up
        self._call: Any = stub.Generate(self._requests())
        threading.Thread(target=self._read, name="isthmus-conversation", daemon=True).start()

    def open(self, opening: Opening) -> None:
        """Name the session and its tokens; rounds may follow at once."""
        size = self._send(wire_session.pack_opening(opening))
        self.opening_bytes += size
        self._unanswered = size
        self._sent.clear()

    def send(self, round_: Round) -> None:
        """Ask for a round."""
        size = self._send(wire_session.pack_round(round_))
        self._sent.append((time.monotonic(), size + self._unanswered))
        self._unanswered = 0

    @property
    def answered(self) -> bool:
        """Whether `receive` would not wait: an answer is there, or a failure."""
        return self._failure is not None or not self._incoming.empty()

    def poll(self) -> Committed | None:
        """An answer that is there already, or None. Raises like `receive`."""
        return self._take(0.0)

    def receive(self, timeout_s: float = ANSWER_S) -> Committed:
        """The next answer. Raises DeadlineExceeded, LinkDown, or the error the cloud answered with.

        After DeadlineExceeded and after an error in an answer the conversation may go on.
        """
        committed = self._take(timeout_s)
        if committed is None:
            raise DeadlineExceeded(f"no answer from the cloud within {timeout_s:.1f} s")
        return committed

    def close(self) -> None:
        """Give up the stream; the cloud stops working for it."""
        self._outgoing.put(None)
        self._call.cancel()

    def _take(self, timeout_s: float) -> Committed | None:
        if self._failure is not None:
            raise self._failure
        try:
            came_s, message = self._incoming.get(timeout_s > 0, timeout_s or None)
        except Empty:
            return None
        if isinstance(message, IsthmusError):
            self._failure = message
            self._on_reply(message)
            raise message
        self.bytes_down += message.ByteSize() + GRPC_PREFIX_BYTES
        committed = wire_session.unpack_committed(message, self._vocab)
        self._on_reply(self._reply(committed, came_s))
        return committed

    def _reply(self, committed: Committed, came_s: float) -> StreamObservation:
        if committed.extension or not self._sent:
            return StreamObservation(0, None)
        sent_s, size = self._sent.popleft()
        way_s = came_s - sent_s - committed.queue_s - committed.compute_s
        alone = not self._sent and committed.tokens  # behind another round, or stale, it says nothing about the way
        return StreamObservation(size, max(way_s, 0.0) if alone else None)

    def _send(self, message: pb.GenerateRequest) -> int:
        if self._failure is not None:
            raise self._failure
        self._outgoing.put(message)
        size = message.ByteSize() + GRPC_PREFIX_BYTES
        self.bytes_up += size
        return size

    def _requests(self) -> Iterator[pb.GenerateRequest]:
        while (message := self._outgoing.get()) is not None:
            yield message

    def _read(self) -> None:
        error: IsthmusError = LinkDown("the cloud ended the stream")
        try:
            for response in self._call:
                self._incoming.put((time.monotonic(), response))
        except grpc.RpcError as failure:
            error = rpc_error(failure)
            if isinstance(error, DeadlineExceeded | ContextGone):  # of an answer they mean that the stream goes on
                error = LinkDown(str(error))
        self._outgoing.put(None)
        self._incoming.put((time.monotonic(), error))


def rpc_error(failure: grpc.RpcError) -> IsthmusError:
    """gRPC's exception as ours."""
    return status.to_error(failure.code(), failure.details() or "")
