"""What replies, failures and probes say about one cloud: the circuit breaker, the link's estimate, the window.

    lost      no reply, a broken stream, a reply that cannot be right -> the breaker, which opens after a few
    overload  a refusal for want of room, late beside replies in time -> the window of requests in flight, halved;
              where the refusal says when there may be room, nothing is sent before
    nothing   not sent, or too little time for any cloud              -> a check by the prober

Safe to call from several threads. Knows nothing about gRPC.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Sequence

from isthmus.edge_agent.policy.breaker import Breaker, BreakerLimits, State
from isthmus.edge_agent.policy.estimates import LinkEstimate, LinkEstimator, Probe
from isthmus.edge_agent.policy.exploration import ProbeSchedule
from isthmus.edge_agent.policy.window import Window
from isthmus.edge_agent.slots import FairSlots
from isthmus.models.errors import (
    CallerError,
    DeadlineExceeded,
    LinkDown,
    LinkError,
    OverBudget,
    Overloaded,
    Refused,
    ServiceError,
)
from isthmus.models.messages import CloudReply

PROBE_TIMEOUT_S = 2.0
FAIR_WAIT_S = 0.1  # a shorter wait without a reply says nothing about the cloud, whatever the estimate of the link
CHECK_INTERVAL_S = 2.0  # between checks of a cloud that did not reply within waits too short to count
MAX_HOLD_S = 2.0  # that a cloud without room can ask for: a wild hint must not keep a device away for long
MAX_AHEAD_S = 0.25  # of earlier messages on their way up when one is sent: enough to keep the uplink busy
MAX_QUEUED_S = 1.0  # of the way of a photo behind others: half of the time in which a ping is to be answered
NOT_ANSWERING = "the cloud is not answering"


class Attempt:
    """One request: the seconds it may take, when it was first sent, what was sent, and whether the cloud replied."""

    def __init__(
        self,
        budget_s: float,
        on_sent: Callable[[int], None] = lambda up_bytes: None,
        queued: Callable[[int], float] = lambda up_bytes: 0.0,
        charge: Callable[[int], None] = lambda up_bytes: None,
    ) -> None:
        """Begins now. `on_sent` is called with the bytes of each message sent; `charge` before it is, and may raise.

        `queued` says how many bytes are before them.
        """
        self.deadline_s = time.monotonic() + budget_s
        self.budget_s = budget_s  # of the wait for a reply, from the moment when it may be sent
        self.sent_s: float | None = None
        self.up_bytes = 0
        self.ahead_bytes = 0.0  # of other messages, which were on their way up when the last one of it was sent
        self.replied = False
        self._on_sent, self._queued, self.charge = on_sent, queued, charge
        self.give_turn: Callable[[], None] = lambda: None  # the next one may be sent

    def admitted(self) -> None:
        """It has a slot: what is left of its time is for the exchange."""
        self.budget_s = self.deadline_s - time.monotonic()

    def sent(self, up_bytes: int) -> None:
        """One message of it was sent."""
        self.sent_s = time.monotonic() if self.sent_s is None else self.sent_s
        self.up_bytes += up_bytes
        self.ahead_bytes = self._queued(up_bytes)
        self._on_sent(up_bytes)
        self.give_turn()


class CloudHealth:
    """Starts without a cloud: the first probe decides whether it may be used."""

    def __init__(self, breaker: BreakerLimits, opened: Callable[[], None], probes: ProbeSchedule) -> None:
        """`opened` is called when the breaker opens. `probes`: when to measure a link that requests do not measure."""
        self._lock = threading.Lock()
        self._breaker = Breaker(breaker)
        self._estimator = LinkEstimator()
        self._window = Window()
        self._probes = probes
        self._opened = opened
        self._answered_s = self._checked_s = float("-inf")  # when a request was last answered, the cloud checked
        self._hold_until_s = float("-inf")  # the cloud has said that it has no room before
        self._suspected = False  # of being lost: some replies did not come, within waits too short to count
        self.slots = FairSlots(1)  # of requests in flight; one while the breaker tries the cloud, and the others wait
        self._turn = FairSlots(1)  # to be sent
        self.wake = threading.Event()  # the prober may have something to do
        self.refusal: str | None = "the cloud has not answered yet"

    @property
    def state(self) -> State:
        return self._breaker.state

    @property
    def ready(self) -> bool:
        """Whether a request would be sent at once: the cloud may be used, has room, and is not being tried."""
        return self.state != "open" and not self.slots.full and time.monotonic() >= self._hold_until_s

    @property
    def estimate(self) -> LinkEstimate:
        with self._lock:
            return self._estimator.at(time.monotonic())

    @property
    def changes(self) -> int:
        """How often the link has changed, as far as was noticed."""
        return self._estimator.changes

    def planned(self) -> None:
        """A request was planned with the estimate. The prober measures the link if no request did for long."""
        now_s = time.monotonic()
        self._probes.planned(now_s)
        if self._probe_due(now_s):
            self.wake.set()

    def record_sent(self, up_bytes: int) -> float:
        """A message is sent. Returns the bytes of earlier ones that are still on their way up, as predicted."""
        with self._lock:
            return self._estimator.sent(up_bytes, time.monotonic())

    def admit(self, patience_s: float) -> None:
        """Raises LinkDown unless a request may be sent now.

        While the cloud has said that it has no room a request waits `patience_s` at most. Raises Overloaded where that
        is too short.
        """
        with self._lock:
            hold_s = self._hold_until_s - time.monotonic()
        if hold_s > 0:
            if hold_s > patience_s:
                raise Overloaded("the cloud has no room yet", hold_s)
            time.sleep(hold_s)
        with self._lock:
            if not self._breaker.allow_request():
                raise LinkDown(self.refusal or "the cloud is being tried with another request")

    def await_uplink(self, attempt: Attempt, up_bytes: int) -> None:
        """Wait for the turn of a request, and until earlier ones have mostly left, so that a ping is answered in time.

        The turn ends when it is sent, or with `give_turn`. Raises Overloaded where that is too long.
        """
        until_s = attempt.deadline_s - self.estimate.transfer_s(up_bytes)
        if not self._turn.acquire(max(until_s - time.monotonic(), 0.0)):
            raise Overloaded("earlier requests of this device are on their way up for as long as this one has time")
        attempt.give_turn = once(self._turn.release)
        while (wait_s := min(self._ahead_s() - MAX_AHEAD_S, until_s - time.monotonic())) > 0:
            time.sleep(wait_s)

    def _ahead_s(self) -> float:
        """Seconds in which what was sent will have left the device."""
        found = self.estimate
        return found.ahead_bytes / found.bytes_per_s

    def record_answer(self, up_bytes: int = 0, elapsed_s: float | None = None) -> None:
        """A request was answered after `elapsed_s` without the cloud's own time; None if that is not known."""
        with self._lock:
            self._breaker.record_success()
            self._answered_s = now_s = time.monotonic()
            self._window.answered(self.slots.full)
            if elapsed_s is not None:
                self._estimator.observe(up_bytes, elapsed_s, now_s)
        self._resize()

    def record_reply(self, reply: CloudReply, elapsed_s: float, *, up: int, down: int, ahead: float) -> None:
        """A photo was answered after `elapsed_s`: bytes of both messages, and of those before it on their way up."""
        now_s, transit_s = time.monotonic(), elapsed_s - reply.queue_s - reply.compute_s
        with self._lock:
            self._estimator.observe(up, transit_s, now_s, down_bytes=down, ahead_bytes=ahead)
            self._estimator.replied(down, reply.queue_s, now_s)
            if ahead and transit_s > MAX_QUEUED_S:
                self._window.overloaded(now_s - elapsed_s, now_s)
        self.record_answer()

    def record_error(self, error: BaseException, attempt: Attempt) -> None:
        """What the error of a request says about the cloud, which may be nothing."""
        if isinstance(error, Refused):
            self.trip(str(error))
        elif isinstance(error, OverBudget):
            self._record_nothing(suspected=attempt.up_bytes > 0)
        elif attempt.sent_s is None and not isinstance(error, LinkError | ServiceError):
            self._record_nothing(suspected=False)
        elif self._overloaded(error, attempt):
            self._record_overload(attempt, error.retry_s if isinstance(error, Overloaded) else 0.0)
        elif isinstance(error, DeadlineExceeded) and attempt.budget_s < self._fair_wait_s(attempt.up_bytes):
            self._record_nothing(suspected=attempt.up_bytes > 0)
        elif isinstance(error, CallerError):
            with self._lock:
                self._breaker.record_success()  # the cloud works, the request was at fault
            self._resize()
        else:
            self.record_failure(str(error) or type(error).__name__, attempt.sent_s)

    def record_failure(self, reason: str, sent_s: float | None = None) -> None:
        """A request failed because the cloud is down, or late with everything."""
        with self._lock:
            self._estimator.lost()
        self._record(reason, lambda now_s: self._breaker.record_failure(now_s, now_s if sent_s is None else sent_s))

    def trip(self, reason: str) -> None:
        """Send nothing more until a probe finds that the cloud serves this device."""
        self._record(reason, self._breaker.trip)

    def record_probe(self, refusal: str | None, measured: Sequence[Probe] = ()) -> None:
        """A probe was answered, or failed with `refusal`."""
        self.record_measured(measured)
        with self._lock:
            self.refusal = refusal
            self._breaker.record_probe(refusal is None, time.monotonic())
        self._resize()

    def record_measured(self, measured: Sequence[Probe]) -> None:
        """Probes were answered, whose sizes differ."""
        with self._lock:
            self._estimator.measure(measured, time.monotonic())

    def take_probe(self, size: int, *, needed: bool = False) -> bool:
        """Whether `size` bytes may be sent now to measure the link: if that is due or `needed`."""
        now_s = time.monotonic()
        return (needed or self._probe_due(now_s)) and self._probes.take(size, self.changes, now_s)

    def may_spend(self, size: int) -> bool:
        """Whether `size` bytes may be sent now to find out whether the cloud answers."""
        return self._probes.spend(size, 1.0)

    def probe_wait_s(self) -> float:
        """Seconds until the next probe is due; infinite unless the breaker is open."""
        with self._lock:
            due_s = self._breaker.probe_at_s if self._breaker.state == "open" else float("inf")
        return due_s - time.monotonic()

    def take_check(self) -> bool:
        """Whether a cloud that may be lost is to be checked now."""
        with self._lock:
            due = self._suspected and time.monotonic() - self._checked_s > CHECK_INTERVAL_S
            if due:
                self._suspected, self._checked_s = False, time.monotonic()
            return due

    def _probe_due(self, now_s: float) -> bool:
        return self.state == "closed" and self._probes.due(self.estimate.age_s, self.changes, now_s)

    def _overloaded(self, error: BaseException, attempt: Attempt) -> bool:
        """Whether the cloud is alive and has too much to do: it says so, or others were answered meanwhile."""
        if isinstance(error, Overloaded) or (isinstance(error, DeadlineExceeded) and attempt.replied):
            return True
        sent_s = attempt.sent_s
        return isinstance(error, DeadlineExceeded) and sent_s is not None and self._answered_s > sent_s

    def _record_overload(self, attempt: Attempt, retry_s: float) -> None:
        now_s = time.monotonic()
        hold_s = min(retry_s, MAX_HOLD_S) * random.uniform(0.5, 1.5)  # or all devices would come back together
        with self._lock:
            self._breaker.record_success()
            self._window.overloaded(now_s if attempt.sent_s is None else attempt.sent_s, now_s)
            self._hold_until_s = max(self._hold_until_s, now_s + hold_s)
        self._resize()

    def _resize(self) -> None:
        self.slots.resize(self._window.size if self.state == "closed" else 1)

    def _record_nothing(self, suspected: bool) -> None:
        with self._lock:
            self._breaker.record_nothing()
            self._suspected = self._suspected or suspected
        self.wake.set()

    def _fair_wait_s(self, up_bytes: int) -> float:
        """A wait that a working cloud rarely exceeds; bounded, since the estimate may be wrong."""
        return min(max(FAIR_WAIT_S, 2 * self.estimate.transfer_s(up_bytes)), PROBE_TIMEOUT_S)

    def _record(self, reason: str, record: Callable[[float], None]) -> None:
        """A failure. If it opens the breaker, `reason` is the refusal."""
        with self._lock:
            record(time.monotonic())
            opened = self._breaker.state == "open"
            if opened:
                self.refusal = reason
        self._resize()
        if opened:
            self._opened()
        self.wake.set()


def once(act: Callable[[], None]) -> Callable[[], None]:
    """Calls after the first do nothing."""
    left = [act]
    return lambda: left.pop()() if left else None
