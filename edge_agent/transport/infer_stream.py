"""One `InferStream` call: requests go out, responses come back in any order, matched by request id.

Knows nothing about payloads, estimates or the circuit breaker.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any

import grpc

from isthmus.edge_agent.transport.channel import rpc_error
from isthmus.edge_agent.transport.cloud_stub import CloudStub
from isthmus.models.errors import Draining, InvalidReply, IsthmusError, LinkDown
from isthmus.protos import wire
from isthmus.protos.isthmus.v1 import isthmus_pb2 as pb


class InferStream:
    """Requests leave in order through a queue; each response resolves the future of its request.

    Safe to call from several threads.
    """

    def __init__(self, stub: CloudStub, late: Callable[[], None]) -> None:
        """`late` is called for each response that nobody waits for any more."""
        self._outgoing: SimpleQueue[pb.InferRequest | None] = SimpleQueue()
        self._pending: dict[int, Future[pb.InferResponse]] = {}
        self._given_up: set[int] = set()  # ids whose response may still come
        self._lock = threading.Lock()
        self._late = late
        self._opened_s = self._active_s = time.monotonic()  # active: a request was sent, or a response received
        self._abandoned = False
        self.ended: IsthmusError | None = None
        self._call: Any = stub.InferStream(self._requests())
        threading.Thread(target=self._read, name="isthmus-infer-stream", daemon=True).start()

    def send(self, message: pb.InferRequest) -> Future[pb.InferResponse] | None:
        """Queue one request. Returns None, and sends nothing, when the stream has ended; `ended` holds the reason."""
        future: Future[pb.InferResponse] = Future()
        with self._lock:  # covers the queue too: no message may follow the end marker that `retire` puts there
            if self.ended:
                return None
            self._active_s = time.monotonic()
            self._pending[message.request_id] = future
            self._outgoing.put(message)
        return future

    @property
    def age_s(self) -> float:
        """Seconds since it was opened."""
        return time.monotonic() - self._opened_s

    @property
    def idle_s(self) -> float:
        """Seconds without a request or response; 0 while a request is outstanding."""
        with self._lock:
            return 0.0 if self._pending else time.monotonic() - self._active_s

    def give_up(self, request_id: int) -> None:
        """Forget a request. A response that still comes counts as late."""
        with self._lock:
            if self._pending.pop(request_id, None) is not None:
                self._given_up.add(request_id)
        self._end_if_abandoned()

    def retire(self, reason: IsthmusError) -> None:
        """Send nothing more. Outstanding responses are still delivered."""
        with self._lock:
            self.ended = self.ended or reason
            self._outgoing.put(None)

    def abandon(self) -> None:
        """Send nothing more, and abort the call when nobody waits for a response any more: it may hang."""
        self.retire(LinkDown("the stream was given up"))
        self._abandoned = True
        self._end_if_abandoned()

    def cancel(self) -> None:
        """Abort the call. Every outstanding future fails with LinkDown."""
        self.retire(LinkDown("the stream was cancelled"))
        self._call.cancel()

    def _end_if_abandoned(self) -> None:
        with self._lock:
            unused = self._abandoned and not self._pending
        if unused:
            self._call.cancel()

    def _requests(self) -> Iterator[pb.InferRequest]:
        while (message := self._outgoing.get()) is not None:
            yield message

    def _read(self) -> None:
        error: IsthmusError = LinkDown("the cloud ended the stream")
        try:
            for response in self._call:
                wire.check_answer(response)
                if wire.is_drain_notice(response):
                    self.retire(Draining("the cloud is shutting down"))
                else:
                    self._deliver(response)
        except grpc.RpcError as failure:
            error = rpc_error(failure)
        except InvalidReply as failure:  # whose answer it was is not known: nothing of this stream is trusted
            error = failure
            self._call.cancel()
        self.retire(error)
        with self._lock:
            pending, self._pending = self._pending, {}
        for future in pending.values():
            future.set_exception(error)

    def _deliver(self, response: pb.InferResponse) -> None:
        """Raises InvalidReply for an id that was not sent, or was answered before."""
        with self._lock:
            self._active_s = time.monotonic()
            future = self._pending.pop(response.request_id, None)
            if future is None and response.request_id not in self._given_up:
                raise InvalidReply(f"the cloud answered request {response.request_id}, which is not outstanding")
            self._given_up.discard(response.request_id)
        if future is None:
            self._late()
        else:
            future.set_result(response)
