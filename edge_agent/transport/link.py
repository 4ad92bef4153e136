"""The way to the cloud, and the only user of gRPC on the device: one long-lived stream, a breaker, estimates.

Knows nothing about images or policy: payload in, answer out, or an error of the link or the cloud.
A background thread probes a cloud that is not known to be well, so that no request has to.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import grpc

from isthmus.edge_agent.config import Tls
from isthmus.edge_agent.policy.breaker import Breaker, BreakerLimits, State
from isthmus.edge_agent.policy.estimates import LinkEstimate, LinkEstimator
from isthmus.edge_agent.transport.generate_stream import GRPC_PREFIX_BYTES, GenerateStream, StreamObservation, rpc_error
from isthmus.models.errors import CallerError, DeadlineExceeded, Draining, IsthmusError, LinkDown, UnknownBundle
from isthmus.models.messages import CloudReply, CloudRequest, Payload
from isthmus.protos import limits, wire
from isthmus.protos.isthmus.v1 import isthmus_pb2 as pb
from isthmus.protos.isthmus.v1 import isthmus_pb2_grpc as pb_grpc

PROBE_TIMEOUT_S = 2.0
PROBE_BYTES = 8192  # enough to see a thin link's bandwidth: 33 ms at 2 Mbit/s


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer with what it took: bytes with our framing and gRPC's prefix, seconds on the device's clock."""

    answer: CloudReply
    up_bytes: int
    down_bytes: int
    elapsed_s: float


class InferStream:
    """One InferStream call: messages out through a queue, answers to whoever waits for them."""

    def __init__(self, stub: pb_grpc.IsthmusStub, late: Callable[[], None]) -> None:
        self._outgoing: SimpleQueue[pb.InferRequest | None] = SimpleQueue()
        self._pending: dict[int, Future[pb.InferResponse]] = {}
        self._lock = threading.Lock()
        self._late = late
        self.ended: IsthmusError | None = None
        self._call: Any = stub.InferStream(self._requests())
        threading.Thread(target=self._read, name="isthmus-link", daemon=True).start()

    def send(self, message: pb.InferRequest) -> Future[pb.InferResponse] | None:
        """None when the stream has ended, for the reason in `ended`: nothing was sent then."""
        future: Future[pb.InferResponse] = Future()
        with self._lock:  # held for the queue too: no message may come behind the end that `retire` puts there
            if self.ended:
                return None
            self._pending[message.request_id] = future
            self._outgoing.put(message)
        return future

    def give_up(self, request_id: int) -> None:
        """Nobody waits for this answer any more."""
        with self._lock:
            self._pending.pop(request_id, None)

    def retire(self, reason: IsthmusError) -> None:
        """Send nothing more; outstanding answers are still collected."""
        with self._lock:
            self.ended = self.ended or reason
            self._outgoing.put(None)

    def cancel(self) -> None:
        self.retire(LinkDown("the stream was given up"))
        self._call.cancel()

    def _requests(self) -> Iterator[pb.InferRequest]:
        while (message := self._outgoing.get()) is not None:
            yield message

    def _read(self) -> None:
        error: IsthmusError = LinkDown("the cloud ended the stream")
        try:
            for response in self._call:
                if response.request_id == 0:
                    self.retire(Draining("the cloud is shutting down"))
                else:
                    self._deliver(response)
        except grpc.RpcError as failure:
            error = rpc_error(failure)
        self.retire(error)
        with self._lock:
            pending, self._pending = self._pending, {}
        for future in pending.values():
            future.set_exception(error)

    def _deliver(self, response: pb.InferResponse) -> None:
        with self._lock:
            future = self._pending.pop(response.request_id, None)
        if future is None:
            self._late()
        else:
            future.set_result(response)


class Link:
    """Asks the cloud, keeps the estimates true, and stays away from a cloud that is down."""

    def __init__(
        self,
        target: str,
        fingerprint: bytes,
        labels: tuple[int, ...],
        tls: Tls | None = None,
        breaker: BreakerLimits = BreakerLimits(),
        late: Callable[[], None] = lambda: None,
    ) -> None:
        """`fingerprint` of a bundle with `labels` classes a task, or of a language model with as many token ids.

        `late` is called for each answer that came after its deadline. Nothing is awaited here.
        """
        self.target = target
        self._channel = open_channel(target, tls)
        self._stub = pb_grpc.IsthmusStub(self._channel)
        self._fingerprint = fingerprint
        self._labels = labels
        self._late = late
        self._lock = threading.Lock()
        self._breaker = Breaker(breaker)
        self._estimator = LinkEstimator()
        self._stream: InferStream | None = None
        self._next_id = 0
        self._wake = threading.Event()
        self._probed = threading.Event()
        self._closed = False
        self.refusal: str | None = "the cloud has not answered yet"
        self._prober = threading.Thread(target=self._probe_forever, name="isthmus-probe", daemon=True)
        self._prober.start()

    def wait_probed(self, timeout_s: float) -> bool:
        """Wait for the first probe; whether the cloud answered it well."""
        self._probed.wait(timeout_s)
        return self.refusal is None

    @property
    def state(self) -> State:
        return self._breaker.state

    @property
    def estimate(self) -> LinkEstimate:
        with self._lock:
            return self._estimator.estimate

    def usable(self) -> str | None:
        """None when a request may be tried, else why not."""
        return None if self._breaker.state != "open" else (self.refusal or "the cloud is not answering")

    def infer(self, payload: Payload, budget_s: float, tasks: tuple[int, ...] = (0,)) -> Reply:
        """Send one payload and wait at most `budget_s` for its answers to `tasks`: the bundle's indices, rising.

        Raises LinkDown, DeadlineExceeded, or the error the cloud answered with.
        """
        with self._lock:
            if not self._breaker.take():
                raise LinkDown(self.refusal or "the cloud is being tried with another input")
        started_s = time.monotonic()
        try:
            reply = self._exchange(payload, tasks, started_s, budget_s)
        except CallerError:
            with self._lock:
                self._breaker.succeeded()  # it is there, it just did not like the input
            raise
        except BaseException as error:  # an interrupt too: it may have been the trial, which nobody would give back
            self.record_failure(str(error) or type(error).__name__)
            raise
        with self._lock:
            self._breaker.succeeded()
            cloud_s = reply.answer.queue_s + reply.answer.compute_s
            self._estimator.observe(reply.up_bytes, reply.elapsed_s - cloud_s)
        return reply

    def open_generate_stream(self) -> GenerateStream:
        """A stream of rounds about one answer of a language model. Raises LinkDown while it is left alone."""
        if self._breaker.state == "open":
            raise LinkDown(self.refusal or "the cloud is not answering")
        return GenerateStream(self._stub, self._labels[0], self._on_reply)

    def _on_reply(self, reply: StreamObservation | IsthmusError) -> None:
        """What a conversation says of the link."""
        if isinstance(reply, IsthmusError):
            self.record_failure(str(reply))
            return
        with self._lock:
            self._breaker.succeeded()
            if reply.elapsed_s is not None:
                self._estimator.observe(reply.up_bytes, reply.elapsed_s)

    def alive(self, timeout_s: float) -> bool:
        """Whether the cloud answers a Describe now: a slow answer is no lost one."""
        try:
            self._stub.Describe(pb.DescribeRequest(), timeout=timeout_s)
        except grpc.RpcError:
            return False
        return True

    def close(self) -> None:
        """End the stream and the channel."""
        self._closed = True
        self._wake.set()
        if self._stream is not None:
            self._stream.cancel()
        self._prober.join(PROBE_TIMEOUT_S + 1)
        self._channel.close()

    def _exchange(self, payload: Payload, tasks: tuple[int, ...], started_s: float, budget_s: float) -> Reply:
        request_id = self._request_id()
        message = wire.pack_request(CloudRequest(request_id, self._fingerprint, budget_s, payload, tasks))
        stream, future = self._send(message)
        try:
            response = future.result(max(started_s + budget_s - time.monotonic(), 0.001))
        except FutureTimeout as error:
            stream.give_up(request_id)
            raise DeadlineExceeded(f"no answer from the cloud within {1000 * budget_s:.0f} ms") from error
        elapsed_s = time.monotonic() - started_s
        answer = wire.unpack_answer(response, [self._labels[task] for task in tasks])
        up_bytes = message.ByteSize() + GRPC_PREFIX_BYTES
        return Reply(answer, up_bytes, response.ByteSize() + GRPC_PREFIX_BYTES, elapsed_s)

    def _request_id(self) -> int:
        with self._lock:
            self._next_id = self._next_id % limits.MAX_REQUEST_ID + 1
            return self._next_id

    def _send(self, message: pb.InferRequest) -> tuple[InferStream, Future[pb.InferResponse]]:
        """Send on the open stream, on a new one when that has ended. Raises what ended the new one too, if at once."""
        with self._lock:
            future = self._stream.send(message) if self._stream else None
            if self._stream is None or future is None:
                self._stream = InferStream(self._stub, self._late)
                future = self._stream.send(message)
            if future is None:
                raise self._stream.ended or LinkDown("the stream to the cloud ended")
            return self._stream, future

    def record_failure(self, reason: str) -> None:
        """A request met a dead, late or overloaded cloud."""
        with self._lock:
            self._breaker.failed(time.monotonic())
            opened = self._breaker.state == "open"
            stream = self._stream if opened else None
            if opened:
                self.refusal, self._stream = reason, None
        if stream is not None:
            stream.cancel()  # it may hang half-open; the next one starts afresh
        self._wake.set()

    def _probe_forever(self) -> None:
        while not self._closed:
            with self._lock:
                due_s = self._breaker.probe_at_s if self._breaker.state == "open" else float("inf")
            wait_s = due_s - time.monotonic()
            if wait_s <= 0:
                self._probe()
            elif self._wake.wait(min(wait_s, 60.0) * random.uniform(0.9, 1.1)):  # devices must not probe in step
                self._wake.clear()

    def _probe(self) -> None:
        refusal: str | None = None
        try:
            self._describe(0)  # connects; its time would count as round trip
            small, large = self._describe(0), self._describe(PROBE_BYTES)
        except IsthmusError as error:
            refusal = str(error)
        with self._lock:
            if refusal is None:
                for seconds, size in (small, large):
                    self._estimator.observe(size, seconds)
            self.refusal = refusal
            self._breaker.probed(refusal is None, time.monotonic())
        self._probed.set()

    def _describe(self, padding: int) -> tuple[float, int]:
        """Seconds and bytes of one Describe. Raises an error unless the cloud holds our bundle."""
        request = pb.DescribeRequest(padding=random.randbytes(padding))
        started_s = time.monotonic()
        try:
            message = self._stub.Describe(request, timeout=PROBE_TIMEOUT_S)
        except grpc.RpcError as failure:
            raise rpc_error(failure) from failure
        elapsed_s = time.monotonic() - started_s
        info = wire.unpack_service(message)
        offered = [*((b.name, b.fingerprint) for b in info.bundles), *((m.name, m.fingerprint) for m in info.models)]
        if self._fingerprint not in {fingerprint for _, fingerprint in offered}:
            held = ", ".join(f"{name} {fingerprint.hex()[:12]}" for name, fingerprint in offered)
            raise UnknownBundle(f"the cloud does not hold bundle {self._fingerprint.hex()[:12]}, it holds {held}")
        return elapsed_s, request.ByteSize() + GRPC_PREFIX_BYTES


def open_channel(target: str, tls: Tls | None) -> grpc.Channel:
    """A channel that notices half-open links; nothing is connected yet."""
    if tls is None:
        return grpc.insecure_channel(target, limits.client_options())
    key = tls.key.read_bytes() if tls.key else None
    certificate = tls.certificate.read_bytes() if tls.certificate else None
    credentials = grpc.ssl_channel_credentials(tls.ca.read_bytes(), key, certificate)
    return grpc.secure_channel(target, credentials, limits.client_options())
