"""The connection to one cloud: a long-lived stream, a circuit breaker, and estimates of round trip and bandwidth.

Knows nothing about images or policy: a payload goes in, and a reply comes out, or an error of the link or the cloud.
A background thread probes a cloud whose breaker is open, so that no request has to.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass

import grpc

from isthmus.edge_agent.config import Tls
from isthmus.edge_agent.policy.breaker import Breaker, BreakerLimits, State
from isthmus.edge_agent.policy.estimates import LinkEstimate, LinkEstimator
from isthmus.edge_agent.transport.channel import GRPC_PREFIX_BYTES, open_channel, rpc_error
from isthmus.edge_agent.transport.generate_stream import GenerateStream, StreamObservation
from isthmus.edge_agent.transport.infer_stream import InferStream
from isthmus.models.errors import CallerError, DeadlineExceeded, IsthmusError, LinkDown, UnknownBundle
from isthmus.models.messages import CloudReply, CloudRequest, Payload
from isthmus.protos import limits, wire
from isthmus.protos.isthmus.v1 import isthmus_pb2 as pb
from isthmus.protos.isthmus.v1 import isthmus_pb2_grpc as pb_grpc

PROBE_TIMEOUT_S = 2.0
PROBE_BYTES = 8192  # enough to measure the bandwidth of a thin link: 33 ms at 2 Mbit/s


@dataclass(frozen=True, slots=True)
class Exchange:
    """One request and its reply: bytes with our framing and gRPC's prefix, seconds on the device's clock."""

    reply: CloudReply
    up_bytes: int
    down_bytes: int
    elapsed_s: float


class Link:
    """Sends requests to a cloud, measures the connection, and sends nothing while the circuit breaker is open.

    Safe to call from several threads.
    """

    def __init__(
        self,
        target: str,
        fingerprint: bytes,
        labels: tuple[int, ...],
        tls: Tls | None = None,
        breaker: BreakerLimits = BreakerLimits(),
        late: Callable[[], None] = lambda: None,
    ) -> None:
        """`fingerprint` is of a bundle with `labels` classes per task, or of a language model with that many token ids.

        `late` is called for each reply that came after its deadline. Does not wait for the cloud.
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
        """Wait for the first probe. Returns whether the cloud holds the bundle or model."""
        self._probed.wait(timeout_s)
        return self.refusal is None

    @property
    def state(self) -> State:
        return self._breaker.state

    @property
    def estimate(self) -> LinkEstimate:
        with self._lock:
            return self._estimator.estimate

    def unavailable_reason(self) -> str | None:
        """Why no request may be sent now; None when one may."""
        return None if self._breaker.state != "open" else (self.refusal or "the cloud is not answering")

    def infer(self, payload: Payload, budget_s: float, tasks: tuple[int, ...] = (0,)) -> Exchange:
        """Send one payload and wait at most `budget_s` for answers to `tasks`: the bundle's indices, in rising order.

        Raises LinkDown, DeadlineExceeded, or the error that the cloud replied with.
        """
        with self._lock:
            if not self._breaker.allow_request():
                raise LinkDown(self.refusal or "the cloud is being tried with another request")
        started_s = time.monotonic()
        try:
            exchange = self._exchange(payload, tasks, started_s, budget_s)
        except CallerError:
            with self._lock:
                self._breaker.record_success()  # the cloud works, the request was at fault
            raise
        except BaseException as error:  # an interrupt too: it may end the trial request of a half-open breaker
            self.record_failure(str(error) or type(error).__name__)
            raise
        with self._lock:
            self._breaker.record_success()
            cloud_s = exchange.reply.queue_s + exchange.reply.compute_s
            self._estimator.observe(exchange.up_bytes, exchange.elapsed_s - cloud_s)
        return exchange

    def open_generate_stream(self) -> GenerateStream:
        """Open a `Generate` stream for one answer of a language model. Raises LinkDown while the breaker is open."""
        if self._breaker.state == "open":
            raise LinkDown(self.refusal or "the cloud is not answering")
        return GenerateStream(self._stub, self._labels[0], self._on_reply)

    def _on_reply(self, reply: StreamObservation | IsthmusError) -> None:
        """Record a reply, or the failure, of a `Generate` stream."""
        if isinstance(reply, IsthmusError):
            self.record_failure(str(reply))
            return
        with self._lock:
            self._breaker.record_success()
            if reply.elapsed_s is not None:
                self._estimator.observe(reply.up_bytes, reply.elapsed_s)

    def alive(self, timeout_s: float) -> bool:
        """Whether the cloud answers a Describe within `timeout_s`, which tells a slow cloud from a lost one."""
        try:
            self._stub.Describe(pb.DescribeRequest(), timeout=timeout_s)
        except grpc.RpcError:
            return False
        return True

    def close(self) -> None:
        """Cancel the stream and close the channel."""
        self._closed = True
        self._wake.set()
        if self._stream is not None:
            self._stream.cancel()
        self._prober.join(PROBE_TIMEOUT_S + 1)
        self._channel.close()

    def _exchange(self, payload: Payload, tasks: tuple[int, ...], started_s: float, budget_s: float) -> Exchange:
        request_id = self._request_id()
        message = wire.pack_request(CloudRequest(request_id, self._fingerprint, budget_s, payload, tasks))
        stream, future = self._send(message)
        try:
            response = future.result(max(started_s + budget_s - time.monotonic(), 0.001))
        except FutureTimeout as error:
            stream.give_up(request_id)
            raise DeadlineExceeded(f"no answer from the cloud within {1000 * budget_s:.0f} ms") from error
        elapsed_s = time.monotonic() - started_s
        reply = wire.unpack_answer(response, [self._labels[task] for task in tasks])
        up_bytes = message.ByteSize() + GRPC_PREFIX_BYTES
        return Exchange(reply, up_bytes, response.ByteSize() + GRPC_PREFIX_BYTES, elapsed_s)

    def _request_id(self) -> int:
        with self._lock:
            self._next_id = self._next_id % limits.MAX_REQUEST_ID + 1
            return self._next_id

    def _send(self, message: pb.InferRequest) -> tuple[InferStream, Future[pb.InferResponse]]:
        """Send on the open stream, or on a new one if that has ended. Raises what ended the new one, if it has."""
        with self._lock:
            future = self._stream.send(message) if self._stream else None
            if self._stream is None or future is None:
                self._stream = InferStream(self._stub, self._late)
                future = self._stream.send(message)
            if future is None:
                raise self._stream.ended or LinkDown("the stream to the cloud ended")
            return self._stream, future

    def record_failure(self, reason: str) -> None:
        """Tell the breaker of a request that failed because the cloud is down, late or overloaded."""
        with self._lock:
            self._breaker.record_failure(time.monotonic())
            opened = self._breaker.state == "open"
            stream = self._stream if opened else None
            if opened:
                self.refusal, self._stream = reason, None
        if stream is not None:
            stream.cancel()  # it may be half-open and hang; the next request opens a new one
        self._wake.set()

    def _probe_forever(self) -> None:
        while not self._closed:
            with self._lock:
                due_s = self._breaker.probe_at_s if self._breaker.state == "open" else float("inf")
            wait_s = due_s - time.monotonic()
            if wait_s <= 0:
                self._probe()
            elif self._wake.wait(min(wait_s, 60.0) * random.uniform(0.9, 1.1)):  # spread the probes of many devices
                self._wake.clear()

    def _probe(self) -> None:
        refusal: str | None = None
        try:
            self._describe(0)  # connects: the set-up would count as round trip
            small, large = self._describe(0), self._describe(PROBE_BYTES)
        except IsthmusError as error:
            refusal = str(error)
        with self._lock:
            if refusal is None:
                for seconds, size in (small, large):
                    self._estimator.observe(size, seconds)
            self.refusal = refusal
            self._breaker.record_probe(refusal is None, time.monotonic())
        self._probed.set()

    def _describe(self, padding: int) -> tuple[float, int]:
        """Seconds and bytes of one Describe. Raises UnknownBundle unless the cloud holds the bundle or model."""
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
