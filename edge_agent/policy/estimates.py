"""Estimates of the link and of the latency of graphs, updated by measurements."""

from __future__ import annotations

from dataclasses import dataclass

FORGET = 0.98  # the weight of an observation halves after 34 others
MEMORY_BYTES2 = 1000.0**2  # variance of sizes below which the old bandwidth counts more than new observations
OUTLIER = 4.0  # an observation is clipped to this many predictions: one stall is no slow link or busy device
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


class LinkEstimator:
    """Least squares of seconds over bytes, with exponential forgetting.

    Uploads of about one size carry no information about bandwidth; they leave the slope and move only the round trip.
    """

    def __init__(self, prior: LinkEstimate = LinkEstimate(rtt_s=0.05, bytes_per_s=250_000)) -> None:
        self._slope = 1 / prior.bytes_per_s  # seconds a byte
        self._prior_rtt_s = prior.rtt_s
        self._weight = self._bytes = self._seconds = 0.0  # decayed weight and means
        self._bytes2 = self._bytes_seconds = 0.0  # decayed central sums

    def observe(self, up_bytes: int, seconds: float) -> None:
        """One exchange: bytes sent, and seconds until the reply less the cloud's own time."""
        seconds = max(seconds, 0.0)
        if self._weight >= 3:
            seconds = min(seconds, OUTLIER * self.estimate.transfer_s(up_bytes))
        self._weight = FORGET * self._weight + 1
        step_bytes = up_bytes - self._bytes
        self._bytes += step_bytes / self._weight
        step_seconds = seconds - self._seconds
        self._seconds += step_seconds / self._weight
        self._bytes2 = FORGET * self._bytes2 + step_bytes * (up_bytes - self._bytes)
        self._bytes_seconds = FORGET * self._bytes_seconds + step_bytes * (seconds - self._seconds)
        slope = (self._bytes_seconds + MEMORY_BYTES2 * self._slope) / (self._bytes2 + MEMORY_BYTES2)
        self._slope = max(slope, 1e-10)

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
