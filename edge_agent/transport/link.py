"""One cloud, as the agents see it: requests, streams, estimates, and whether it may be used.

infer -> a slot of the window (health) -> the circuit breaker (health) -> sent, once more after a goodbye (exchanges)
prober: finds a lost cloud again, looks for one that may be lost, half-closes an idle stream
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from weakref import WeakSet

from isthmus.edge_agent.config import Tls
from isthmus.edge_agent.lifetime import Lifetime
from isthmus.edge_agent.policy.breaker import BreakerLimits, State
from isthmus.edge_agent.policy.estimates import LinkEstimate
from isthmus.edge_agent.transport.channel import open_channel
from isthmus.edge_agent.transport.exchanges import Exchange, Exchanges
from isthmus.edge_agent.transport.generate_stream import GenerateStream, StreamObservation
from isthmus.edge_agent.transport.health import NOT_ANSWERING, Attempt, CloudHealth
from isthmus.edge_agent.transport.prober import Prober
from isthmus.models.errors import IsthmusError, LinkDown, Overloaded, Refused
from isthmus.models.messages import Payload
from isthmus.protos.isthmus.v1 import isthmus_pb2_grpc as pb_grpc


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
        self._lifetime = Lifetime()
        self._channel = open_channel(target, tls)
        self._stub = pb_grpc.IsthmusStub(self._channel)
        self._vocab = labels[0]
        self._exchanges = Exchanges(self._stub, fingerprint, labels, late)
        self._health = CloudHealth(breaker, self._exchanges.abandon)
        self._generating = WeakSet[GenerateStream]()
        self._prober = Prober(self._stub, fingerprint, self._health, self._retire_idle)

    def wait_probed(self, timeout_s: float) -> bool:
        """Wait for the first probe. Returns whether the cloud holds the bundle or model."""
        self._prober.wait(timeout_s)
        return self.refusal is None

    @property
    def state(self) -> State:
        return self._health.state

    @property
    def refusal(self) -> str | None:
        """What the last probe, or the failure that opened the breaker, found wrong with the cloud."""
        return self._health.refusal

    @property
    def estimate(self) -> LinkEstimate:
        return self._health.estimate

    def unavailable_reason(self) -> str | None:
        """Why no request may be sent now; None when one may."""
        return None if self.state != "open" else (self.refusal or NOT_ANSWERING)

    def infer(
        self,
        payload: Payload,
        budget_s: float,
        tasks: tuple[int, ...] = (0,),
        sent: Callable[[int], None] = lambda up_bytes: None,
    ) -> Exchange:
        """Send one payload and wait at most `budget_s` for answers to `tasks`: the bundle's indices, in rising order.

        Waits within that time while as many requests are in flight as the cloud answers, and while the cloud has said
        that it has no room. Sends it once more if the stream ends with a goodbye before the reply. `sent` is called
        with the bytes of each message sent, whatever becomes of it. Raises LinkDown, DeadlineExceeded, Overloaded,
        AgentClosed after `close`, or the error that the cloud replied with.
        """
        self._lifetime.check()
        attempt = Attempt(budget_s, sent)
        with self._slot(attempt, len(payload.data)):
            self._health.admit(attempt.deadline_s - time.monotonic() - self.estimate.transfer_s(len(payload.data)))
            self._lifetime.check()
            attempt.admitted()
            try:
                exchange = self._exchanges.exchange(payload, tasks, attempt, self._may_send)
            except BaseException as error:  # an interrupt too: it may end the trial request of a half-open breaker
                self._health.record_error(error, attempt)
                raise
            cloud_s = exchange.reply.queue_s + exchange.reply.compute_s
            self._health.record_answer(exchange.up_bytes, exchange.elapsed_s - cloud_s)
        return exchange

    @contextmanager
    def _slot(self, attempt: Attempt, up_bytes: int) -> Iterator[None]:
        """A slot of the window. Raises Overloaded where the wait for it leaves no time for a reply."""
        patience_s = attempt.budget_s - self.estimate.transfer_s(up_bytes)
        if not self._health.slots.acquire(max(patience_s, 0.0)):
            raise Overloaded("other requests of this device are in flight for as long as this one has time")
        try:
            self._lifetime.check()
            yield
        finally:
            self._health.slots.release()

    def _retire_idle(self) -> None:
        self._exchanges.retire_idle()
        for stream in tuple(self._generating):
            stream.retire_idle()

    def _may_send(self) -> bool:
        return not self._lifetime.closed and self.state != "open"

    def open_generate_stream(self) -> GenerateStream:
        """Open a `Generate` stream for one answer of a language model.

        Raises LinkDown while the breaker is open, AgentClosed after `close`.
        """
        self._lifetime.check()
        if (reason := self.unavailable_reason()) is not None:
            raise LinkDown(reason)
        stream = GenerateStream(self._stub, self._vocab, self._on_reply)
        self._generating.add(stream)
        return stream

    def _on_reply(self, reply: StreamObservation | IsthmusError) -> None:
        """Record a reply, or the failure, of a `Generate` stream."""
        if isinstance(reply, Refused):
            self._health.trip(str(reply))
        elif isinstance(reply, IsthmusError):
            self.record_failure(str(reply))
        else:
            self._health.record_answer(reply.up_bytes, reply.elapsed_s)

    def alive(self, timeout_s: float) -> bool:
        """Whether the cloud answers a Describe within `timeout_s`, which tells a slow cloud from a lost one."""
        return self._prober.alive(timeout_s)

    def record_failure(self, reason: str) -> None:
        """Tell the breaker of a request that failed because the cloud is down or late."""
        self._health.record_failure(reason)

    def close(self) -> None:
        """Cancel the stream and close the channel. Later requests raise AgentClosed."""
        inherited, self._lifetime.closed = self._lifetime.inherited, True
        if inherited:  # gRPC's threads are in the process that made it, which goes on using the connection
            return
        self._exchanges.cancel()
        self._prober.close()
        self._channel.close()
