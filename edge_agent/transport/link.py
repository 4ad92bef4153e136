"""One cloud, as an agent for photos sees it.

infer -> a slot of the window (health) -> the circuit breaker (health) -> sent, once more after a goodbye (exchanges)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from isthmus.edge_agent.config import Tls
from isthmus.edge_agent.policy.breaker import BreakerLimits
from isthmus.edge_agent.policy.exploration import ProbeSchedule
from isthmus.edge_agent.transport.cloud_link import CloudLink
from isthmus.edge_agent.transport.exchanges import Exchange, Exchanges
from isthmus.edge_agent.transport.health import Attempt
from isthmus.edge_agent.transport.prober import FetchTokenizer
from isthmus.models.errors import Overloaded, UnknownBundle
from isthmus.models.messages import OutputBounds, Payload, ServiceInfo


class Link(CloudLink):
    """Sends photos to a cloud, and nothing while the circuit breaker is open. Safe to call from several threads."""

    def __init__(
        self,
        target: str,
        fingerprint: bytes,
        expected: Sequence[int | OutputBounds],
        tls: Tls | None = None,
        breaker: BreakerLimits = BreakerLimits(),
        late: Callable[[], None] = lambda: None,
        *,
        probes: ProbeSchedule | None = None,
    ) -> None:
        """`fingerprint` is of a bundle; `expected` of each of its tasks, as `wire.unpack_answer` says.

        `late` is called for each reply that came after its deadline; `probes` says when the link is measured that no
        photo measures. Does not wait for the cloud.
        """
        super().__init__(target, tls, breaker, self._abandon, probes)
        self._exchanges = Exchanges(self._stub, fingerprint, expected, late)
        self._start(HeldBundle(fingerprint), self._exchanges.retire_idle)

    @property
    def ready(self) -> bool:
        """Whether a photo would be sent at once."""
        return self._health.ready

    def infer(
        self,
        payload: Payload,
        budget_s: float,
        tasks: tuple[int, ...] = (0,),
        sent: Callable[[int], None] = lambda up_bytes: None,
        charge: Callable[[int], None] = lambda up_bytes: None,
    ) -> Exchange:
        """Send one payload and wait at most `budget_s` for answers to `tasks`: the bundle's indices, in rising order.

        Waits within that time while as many requests are in flight as the cloud answers, while earlier ones fill the
        uplink, and while the cloud has said that it has no room. Sends it once more if the stream ends with a goodbye
        before the reply. `sent` is called with the bytes of each message sent, whatever becomes of it; `charge` before
        it is sent, and may raise OverBudget. Raises LinkDown, DeadlineExceeded, Overloaded, AgentClosed after `close`,
        or the error that the cloud replied with.
        """
        self._lifetime.check()
        attempt = Attempt(budget_s, sent, self._health.record_sent, charge)
        with self._slot(attempt, len(payload.data)):
            self._health.admit(attempt.deadline_s - time.monotonic() - self.estimate.transfer_s(len(payload.data)))
            self._lifetime.check()
            attempt.admitted()
            try:
                exchange = self._exchanges.exchange(payload, tasks, attempt, self._may_send)
            except BaseException as error:  # an interrupt too: it may end the trial request of a half-open breaker
                self._health.record_error(error, attempt)
                raise
            self._health.record_reply(
                exchange.reply,
                exchange.elapsed_s,
                up=exchange.up_bytes,
                down=exchange.down_bytes,
                ahead=attempt.ahead_bytes,
            )
        return exchange

    @contextmanager
    def _slot(self, attempt: Attempt, up_bytes: int) -> Iterator[None]:
        """A slot of the window, and a turn to send. Raises Overloaded where the wait leaves no time for a reply."""
        patience_s = attempt.budget_s - self.estimate.transfer_s(up_bytes)
        if not self._health.slots.acquire(max(patience_s, 0.0)):
            raise Overloaded("other requests of this device are in flight for as long as this one has time")
        try:
            self._health.await_uplink(attempt, up_bytes)
            self._lifetime.check()
            yield
        finally:
            attempt.give_turn()
            self._health.slots.release()

    def _may_send(self) -> bool:
        return not self._lifetime.closed and self.state != "open"

    def _abandon(self) -> None:
        self._exchanges.abandon()

    def _cancel(self) -> None:
        self._exchanges.cancel()

    def _renewed(self) -> None:
        self._exchanges.retire()


class HeldBundle:
    """What an agent for photos wants of a cloud: the bundle of this fingerprint."""

    def __init__(self, fingerprint: bytes) -> None:
        self._fingerprint = fingerprint

    def check(self, info: ServiceInfo, fetch: FetchTokenizer) -> None:
        """Raises UnknownBundle unless the cloud holds the bundle."""
        offered = [*((b.name, b.fingerprint) for b in info.bundles), *((m.name, m.fingerprint) for m in info.models)]
        if self._fingerprint not in {fingerprint for _, fingerprint in offered}:
            held = ", ".join(f"{name} {fingerprint.hex()[:12]}" for name, fingerprint in offered)
            raise UnknownBundle(f"the cloud does not hold bundle {self._fingerprint.hex()[:12]}, it holds {held}")

    def lost(self) -> None:
        """Nothing depends on it."""
