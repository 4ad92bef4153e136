"""Estimates of the link and of the latency of graphs, updated by measurements.

What can exclude a route is guarded three times: one outlier moves it little, two quick measurements end an estimate
that is far too slow, and an excluded route is explored now and then, since without requests nothing is measured.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from statistics import median_low

FORGET = 0.98  # the weight of an observation halves after 34 others
MEMORY_BYTES2 = 1000.0**2  # variance of sizes below which the old bandwidth counts more than new observations
SPREAD = 0.25  # relative standard deviation of a transfer
OUTLIER = 4.0  # an observation is clipped to this many predictions: one stall is no slow link or busy device
GUARDED_WEIGHT = 1.5  # of observations, from which the link's outliers are clipped: after a small and a large probe
QUICK = 2  # observations in a row, each below 1 / OUTLIER of the prediction, that replace the estimate
EXPLORE_EVERY, EXPLORE_AT_MOST = 5, 80  # excluded requests before one is sent; the interval doubles up to the second
EXPLORE_AGE_S = 30.0  # after this long without exploration the next excluded request is sent
LOAD_WEIGHT = 0.2  # of one run of a graph in the device's load
IDLE_WEIGHT = 0.01  # of one run in the graph's idle latency: nearly all change is a change of load


@dataclass(frozen=True, slots=True)
class LinkEstimate:
    """An upload of b bytes is answered after `rtt_s` + b / `bytes_per_s`, without the cloud's own time."""

    rtt_s: float
    bytes_per_s: float

    def transfer_s(self, up_bytes: float) -> float:
        """Predicted seconds from sending `up_bytes` to the reply, without the cloud's own time."""
        return self.rtt_s + up_bytes / self.bytes_per_s

    def spread_s(self, up_bytes: float) -> float:
        """Standard deviation of `transfer_s(up_bytes)`."""
        return SPREAD * self.transfer_s(up_bytes)


class LinkEstimator:
    """Least squares of seconds over bytes, with exponential forgetting.

    Uploads of about one size carry no information about bandwidth; they leave the slope and move only the round trip.
    """

    def __init__(self, prior: LinkEstimate = LinkEstimate(rtt_s=0.05, bytes_per_s=250_000)) -> None:
        self._slope = 1 / prior.bytes_per_s  # seconds a byte
        self._prior_rtt_s = prior.rtt_s
        self._weight = self._bytes = self._seconds = 0.0  # decayed weight and means
        self._bytes2 = self._bytes_seconds = 0.0  # decayed central sums
        self._quick = 0  # observations in a row far below the prediction

    def observe(self, up_bytes: int, seconds: float) -> None:
        """One exchange: bytes sent, and seconds until the reply less the cloud's own time.

        Ignored unless `seconds` are positive: the cloud then claims more time than there was.
        """
        if not seconds > 0:
            return
        predicted_s = self.estimate.transfer_s(up_bytes)
        if self._weight >= GUARDED_WEIGHT:
            seconds = min(seconds, OUTLIER * predicted_s)
        self._quick = self._quick + 1 if self._weight and seconds < predicted_s / OUTLIER else 0
        if self._quick >= QUICK:
            self._restart(seconds / max(up_bytes, 1))
        self._weight = FORGET * self._weight + 1
        step_bytes = up_bytes - self._bytes
        self._bytes += step_bytes / self._weight
        step_seconds = seconds - self._seconds
        self._seconds += step_seconds / self._weight
        self._bytes2 = FORGET * self._bytes2 + step_bytes * (up_bytes - self._bytes)
        self._bytes_seconds = FORGET * self._bytes_seconds + step_bytes * (seconds - self._seconds)
        slope = (self._bytes_seconds + MEMORY_BYTES2 * self._slope) / (self._bytes2 + MEMORY_BYTES2)
        self._slope = max(slope, 1e-10)

    def _restart(self, slope: float) -> None:
        """Forget what was observed. `slope`: seconds a byte that the link is known to reach."""
        self._weight = self._bytes = self._seconds = self._bytes2 = self._bytes_seconds = 0.0
        self._slope, self._quick = min(self._slope, slope), 0

    @property
    def estimate(self) -> LinkEstimate:
        """The fit so far; the prior before the first observation."""
        if not self._weight:
            return LinkEstimate(self._prior_rtt_s, 1 / self._slope)
        return LinkEstimate(max(self._seconds - self._slope * self._bytes, 0.0), 1 / self._slope)


class Average:
    """Exponentially weighted mean that starts at `prior` and leaves it with the first observation."""

    def __init__(self, prior: float, weight: float = 0.1) -> None:
        self._weight = weight
        self._count = 0
        self.value = prior

    def observe(self, value: float) -> None:
        self._count += 1
        self.value += (value - self.value) * max(self._weight, 1 / self._count)


class GuardedAverage(Average):
    """An average that a single outlier does not move, and that two low observations of three end if it is far too high.

    It averages the median of the last three observations; of two, the lower one.
    """

    def __init__(self, prior: float, weight: float = 0.1) -> None:
        super().__init__(prior, weight)
        self._last: deque[float] = deque(maxlen=3)

    def observe(self, value: float) -> None:
        self._last.append(value)
        filtered = median_low(self._last)
        if filtered < self.value / OUTLIER or len(self._last) < 3:
            self._count, self.value = 1, filtered
        else:
            super().observe(filtered)


class Exploration:
    """Which of the requests that the estimates exclude from the cloud are sent all the same.

    Every fifth at first; each one without a reply in time doubles the interval. After a pause the first one is sent.
    """

    def __init__(self, now_s: float) -> None:
        self._every = EXPLORE_EVERY
        self._excluded = 0
        self._explored_s = now_s

    def due(self, now_s: float) -> bool:
        """Count one excluded request. Returns whether to send it, which counts as without a reply until `replied`."""
        self._excluded += 1
        if self._excluded < self._every and now_s - self._explored_s < EXPLORE_AGE_S:
            return False
        self._excluded, self._explored_s = 0, now_s
        self._every = min(2 * self._every, EXPLORE_AT_MOST)
        return True

    def replied(self) -> None:
        """A request was answered in time."""
        self._every = EXPLORE_EVERY


class DeviceLoad:
    """Current latency of graphs over their idle latency: one factor for all graphs of a device."""

    def __init__(self) -> None:
        self.value = 1.0


class GraphLatency:
    """Predicted latency of one graph in seconds: its idle latency, which changes slowly, times the device's load.

    A run of any graph updates the load, and so the predictions for all of them.
    """

    def __init__(self, prior_s: float, load: DeviceLoad) -> None:
        self._idle = Average(prior_s)
        self._load = load

    @property
    def value(self) -> float:
        """Predicted seconds of the next run."""
        return self._idle.value * self._load.value

    def calibrate(self, seconds: float) -> None:
        """Record a run on an otherwise idle device, in seconds."""
        self._idle.observe(seconds)

    def observe(self, seconds: float) -> None:
        """Record a run in service, in seconds."""
        idle_s, load = max(self._idle.value, 1e-9), self._load.value
        seconds = min(seconds, OUTLIER * idle_s * load)
        self._idle.value = idle_s + IDLE_WEIGHT * (seconds / max(load, 1e-9) - idle_s)
        self._load.value += LOAD_WEIGHT * (seconds / idle_s - load)
