"""The connection to one cloud: a long-lived stream, a circuit breaker, and estimates of round trip and bandwidth.

Knows nothing about images or policy: a payload goes in, and a reply comes out, or an error of the link or the cloud.
A background thread probes a cloud whose breaker is open, so that no request has to, checks one that may be lost, and
half-closes an idle stream.
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
from isthmus.models.errors import (
    AgentClosed,
    CallerError,
    DeadlineExceeded,
    Draining,
    IsthmusError,
    LinkDown,
    LinkError,
    Refused,
    ServiceError,
    UnknownBundle,
)
from isthmus.models.messages import CloudReply, CloudRequest, Payload
from isthmus.protos import limits, wire
from isthmus.protos.isthmus.v1 import isthmus_pb2 as pb
from isthmus.protos.isthmus.v1 import isthmus_pb2_grpc as pb_grpc

PROBE_TIMEOUT_S = 2.0
FAIR_WAIT_S = 0.1  # a shorter wait without a reply says nothing about the cloud, whatever the estimate of the link
CHECK_INTERVAL_S = 2.0  # between checks of a cloud that did not reply within waits too short to count
RETRY_LEFT_S = 0.005  # of a request's time; with less it is not sent a second time
IDLE_CHECK_S = limits.IDLE_STREAM_S / 2
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
        self._suspected = False  # of being lost: some replies did not come, within waits too short to count
        self._checked_s = float("-inf")
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

    def infer(
        self,
        payload: Payload,
        budget_s: float,
        tasks: tuple[int, ...] = (0,),
        sent: Callable[[int], None] = lambda up_bytes: None,
    ) -> Exchange:
        """Send one payload and wait at most `budget_s` for answers to `tasks`: the bundle's indices, in rising order.

        Sends it once more if the stream ends with a goodbye before the reply. `sent` is called with the bytes of each
        message sent, whatever becomes of it. Raises LinkDown, DeadlineExceeded, AgentClosed after `close`, or the error
        that the cloud replied with.
        """
        with self._lock:
            self._raise_if_closed()
            if not self._breaker.allow_request():
                raise LinkDown(self.refusal or "the cloud is being tried with another request")
        up_bytes = 0

        def count(size: int) -> None:
            nonlocal up_bytes
            up_bytes += size
            sent(size)

        try:
            exchange = self._exchange_or_retry(payload, tasks, budget_s, count)
        except BaseException as error:  # an interrupt too: it may end the trial request of a half-open breaker
            self._record_error(error, up_bytes, budget_s)
            raise
        with self._lock:
            self._breaker.record_success()
            cloud_s = exchange.reply.queue_s + exchange.reply.compute_s
            self._estimator.observe(exchange.up_bytes, exchange.elapsed_s - cloud_s)
        return exchange

    def open_generate_stream(self) -> GenerateStream:
        """Open a `Generate` stream for one answer of a language model.

        Raises LinkDown while the breaker is open, AgentClosed after `close`.
        """
        self._raise_if_closed()
        if self._breaker.state == "open":
            raise LinkDown(self.refusal or "the cloud is not answering")
        return GenerateStream(self._stub, self._labels[0], self._on_reply)

    def _on_reply(self, reply: StreamObservation | IsthmusError) -> None:
        """Record a reply, or the failure, of a `Generate` stream."""
        if isinstance(reply, Refused):
            self._trip(str(reply))
            return
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
        """Cancel the stream and close the channel. Later requests raise AgentClosed."""
        with self._lock:
            self._closed, stream = True, self._stream
        self._wake.set()
        if stream is not None:
            stream.cancel()
        self._prober.join(PROBE_TIMEOUT_S + 1)
        self._channel.close()

    def _raise_if_closed(self) -> None:
        if self._closed:
            raise AgentClosed("the agent was closed before this request")

    def _exchange_or_retry(
        self, payload: Payload, tasks: tuple[int, ...], budget_s: float, sent: Callable[[int], None]
    ) -> Exchange:
        """An exchange; one more in the time left, on a new stream, if the cloud says goodbye or the stream ends."""
        deadline_s = time.monotonic() + budget_s
        try:
            return self._exchange(payload, tasks, budget_s, sent)
        except (LinkDown, Draining):
            if self._closed or self._breaker.state == "open" or deadline_s - time.monotonic() < RETRY_LEFT_S:
                raise
        return self._exchange(payload, tasks, deadline_s - time.monotonic(), sent)

    def _exchange(
        self, payload: Payload, tasks: tuple[int, ...], budget_s: float, sent: Callable[[int], None]
    ) -> Exchange:
        started_s = time.monotonic()
        request_id = self._request_id()
        message = wire.pack_request(CloudRequest(request_id, self._fingerprint, budget_s, payload, tasks))
        up_bytes = message.ByteSize() + GRPC_PREFIX_BYTES
        stream, future = self._send(message)
        sent(up_bytes)
        try:
            response = future.result(max(started_s + budget_s - time.monotonic(), 0.001))
        except FutureTimeout as error:
            stream.give_up(request_id)
            raise DeadlineExceeded(f"no answer from the cloud within {1000 * budget_s:.0f} ms") from error
        elapsed_s = time.monotonic() - started_s
        reply = wire.unpack_answer(response, [self._labels[task] for task in tasks])
        return Exchange(reply, up_bytes, response.ByteSize() + GRPC_PREFIX_BYTES, elapsed_s)

    def _request_id(self) -> int:
        with self._lock:
            self._next_id = self._next_id % limits.MAX_REQUEST_ID + 1
            return self._next_id

    def _send(self, message: pb.InferRequest) -> tuple[InferStream, Future[pb.InferResponse]]:
        """Send on the open stream, or on a new one if that has ended. Raises what ended the new one, if it has."""
        with self._lock:
            self._raise_if_closed()
            future = self._stream.send(message) if self._stream else None
            if self._stream is None or future is None:
                self._stream = InferStream(self._stub, self._late)
                future = self._stream.send(message)
            if future is None:
                raise self._stream.ended or LinkDown("the stream to the cloud ended")
            return self._stream, future

    def _record_error(self, error: BaseException, up_bytes: int, budget_s: float) -> None:
        """Tell the breaker what the error of a request says about the cloud, which may be nothing."""
        unfair = isinstance(error, DeadlineExceeded) and budget_s < self._fair_wait_s(up_bytes)
        if isinstance(error, Refused):
            self._trip(str(error))
        elif unfair or (not up_bytes and not isinstance(error, LinkError | ServiceError)):
            with self._lock:
                self._breaker.record_nothing()
                self._suspected = self._suspected or up_bytes > 0
            self._wake.set()
        elif isinstance(error, CallerError):
            with self._lock:
                self._breaker.record_success()  # the cloud works, the request was at fault
        else:
            self.record_failure(str(error) or type(error).__name__)

    def _fair_wait_s(self, up_bytes: int) -> float:
        """A wait that a working cloud rarely exceeds; bounded, since the estimate may be wrong."""
        return min(max(FAIR_WAIT_S, 2 * self.estimate.transfer_s(up_bytes)), PROBE_TIMEOUT_S)

    def record_failure(self, reason: str) -> None:
        """Tell the breaker of a request that failed because the cloud is down, late or overloaded."""
        self._open_breaker(reason, self._breaker.record_failure)

    def _trip(self, reason: str) -> None:
        """Send nothing more until a probe finds that the cloud serves this device."""
        self._open_breaker(reason, self._breaker.trip)

    def _open_breaker(self, reason: str, record: Callable[[float], None]) -> None:
        """Record a failure. If that opens the breaker, `reason` is the refusal and the stream is cancelled."""
        with self._lock:
            record(time.monotonic())
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
                check_due = self._suspected and time.monotonic() - self._checked_s > CHECK_INTERVAL_S
            wait_s = due_s - time.monotonic()
            self._retire_idle_stream()
            if wait_s <= 0:
                self._probe()
            elif check_due:
                self._check()
            elif self._wake.wait(min(wait_s, IDLE_CHECK_S) * random.uniform(0.9, 1.1)):  # spread many devices' probes
                self._wake.clear()

    def _retire_idle_stream(self) -> None:
        """Half-close a stream that nobody uses, so that no pings go over it; the connection stays."""
        with self._lock:
            if self._stream is not None and self._stream.idle_s > limits.IDLE_STREAM_S:
                self._stream.retire(LinkDown("the stream was idle"))
                self._stream = None

    def _check(self) -> None:
        """Ask a cloud that may be lost for a sign of life. Without one the breaker opens."""
        with self._lock:
            self._suspected, self._checked_s = False, time.monotonic()
        try:
            self._describe(0)
        except IsthmusError as error:
            self._trip(str(error))

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
