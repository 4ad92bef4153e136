"""One cloud, as every agent sees it: its connection, estimates, and whether it may be used.

prober: finds a lost cloud again, looks for one that may be lost, half-closes an idle stream
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from isthmus.edge_agent.config import Tls
from isthmus.edge_agent.lifetime import Lifetime
from isthmus.edge_agent.policy.breaker import BreakerLimits, State
from isthmus.edge_agent.policy.estimates import LinkEstimate
from isthmus.edge_agent.policy.exploration import ProbeSchedule
from isthmus.edge_agent.transport.cloud_stub import CloudStub
from isthmus.edge_agent.transport.health import NOT_ANSWERING, CloudHealth
from isthmus.edge_agent.transport.prober import Match, Prober
from isthmus.edge_agent.transport.tls_failures import explain_closed


class CloudLink:
    """Measures the connection to a cloud, and says when its circuit breaker is open. Safe to call from several threads.

    A subclass sends the requests, and ends its constructor with `_start`.
    """

    def __init__(
        self,
        target: str,
        tls: Tls | None,
        breaker: BreakerLimits,
        opened: Callable[[], None],
        probes: ProbeSchedule | None,
    ) -> None:
        """`opened` is called when the breaker opens. `probes` says when the link is measured that no request measures.

        Does not wait for the cloud.
        """
        self.target = target
        self._lifetime = Lifetime()
        self._tls = tls
        self._stub = CloudStub(target, tls)
        self._health = CloudHealth(breaker, opened, probes or ProbeSchedule())

    def _start(self, match: Match, retire_idle: Callable[[], None]) -> None:
        """Begin to probe. `retire_idle` is called now and then."""

        def tend() -> None:
            if self._stub.renew():
                self._renewed()
            retire_idle()

        explain = partial(explain_closed, target=self.target, tls=self._tls)
        self._prober = Prober(self._stub, match, self._health, tend, explain)

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

    @property
    def changes(self) -> int:
        """How often a lasting change of the link was noticed."""
        return self._health.changes

    def planned(self) -> None:
        """A request was planned with the estimate, whether it is sent or not: the estimate is not to grow old."""
        self._health.planned()

    def unavailable_reason(self) -> str | None:
        """Why no request may be sent now; None when one may."""
        return None if self.state != "open" else (self.refusal or NOT_ANSWERING)

    def alive(self, timeout_s: float) -> bool:
        """Whether the cloud answers a Describe within `timeout_s`, which tells a slow cloud from a lost one."""
        return self._prober.alive(timeout_s)

    def record_failure(self, reason: str) -> None:
        """Tell the breaker of a request that failed because the cloud is down or late."""
        self._health.record_failure(reason)

    def close(self) -> None:
        """Cancel what is sent and close the channel. Later requests raise AgentClosed."""
        inherited, self._lifetime.closed = self._lifetime.inherited, True
        if inherited:  # gRPC's threads are in the process that made it, which goes on using the connection
            return
        self._cancel()
        self._prober.close()
        self._stub.close()

    def _cancel(self) -> None:
        """Cancel requests under way."""

    def _renewed(self) -> None:
        """Later calls go over another channel; those under way may end over the former one."""
