"""What the device believes of link and processors, learnt from what it measured."""

from __future__ import annotations

from dataclasses import dataclass

FORGET = 0.98  # an observation counts half after 34 others
MEMORY_BYTES2 = 1000.0**2  # spread of sizes below which the old bandwidth is believed rather than the new points
OUTLIER = 4.0  # an observation counts at most this many predictions: one stall is no slow link, no busy device
LOAD_WEIGHT = 0.2  # of one graph's run in what is believed of the device's load
OWN_WEIGHT = 0.01  # of one run in what the graph is believed to take by itself: almost all that changes is the load


@dataclass(frozen=True, slots=True)
class LinkEstimate:
    """An upload of b bytes is answered after `rtt_s` + b / `bytes_per_s`, cloud time apart."""

    rtt_s: float
    bytes_per_s: float

    def transfer_s(self, up_bytes: float) -> float:
        return self.rtt_s + up_bytes / self.bytes_per_s


class LinkEstimator:
    """Least squares of seconds over bytes, old observations forgotten exponentially.

    When all uploads are of about one size they say nothing about bandwidth; then the last slope is kept and only the
    round trip moves.
    """

    def __init__(self, prior: LinkEstimate = LinkEstimate(rtt_s=0.05, bytes_per_s=250_000)) -> None:
        self._slope = 1 / prior.bytes_per_s  # seconds a byte
        self._prior_rtt_s = prior.rtt_s
        self._weight = self._bytes = self._seconds = 0.0  # decayed weight and means
        self._bytes2 = self._bytes_seconds = 0.0  # decayed central sums

    def observe(self, up_bytes: int, seconds: float) -> None:
        """One exchange: bytes sent, seconds until the answer less what the cloud spent on it."""
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


class Load:
    """How many times longer graphs take now than when the device was calibrated; one for all graphs of a device."""

    def __init__(self) -> None:
        self.value = 1.0


class GraphSeconds:
    """Seconds that one graph takes: its own, slow to change, times the load of the moment.

    What slows one graph down is expected to slow down every other: a busy device shows in the estimates of all graphs,
    not only in that of the one last run, and so it shows when it is idle again.
    """

    def __init__(self, prior_s: float, load: Load) -> None:
        self._alone = Average(prior_s)
        self._load = load

    @property
    def value(self) -> float:
        return self._alone.value * self._load.value

    def calibrate(self, seconds: float) -> None:
        """One run while the device does nothing else, as far as anyone knows."""
        self._alone.observe(seconds)

    def observe(self, seconds: float) -> None:
        """One run in service."""
        alone_s, load = max(self._alone.value, 1e-9), self._load.value
        seconds = min(seconds, OUTLIER * alone_s * load)
        self._alone.value = alone_s + OWN_WEIGHT * (seconds / max(load, 1e-9) - alone_s)
        self._load.value += LOAD_WEIGHT * (seconds / alone_s - load)
