"""Averages of measurements, and the latency of the device's graphs. Pure: time comes in as an argument.

What can exclude a route is guarded: one outlier does not move it, a lasting change replaces it after two or three
observations (`changes`), and an excluded route is explored now and then (`exploration`).
"""

from __future__ import annotations

import math
from collections import deque
from statistics import fmean, median_low

from isthmus.edge_agent.policy.changes import ChangeTest

RECENT = 16  # observations kept, of which an average starts over after a change
FIRST = 3  # observations before the test for changes begins; until then the lower median counts
SMALLEST = 1e-15  # keeps logarithms finite
MOST_LOAD = 1000.0  # times its idle latency that a graph takes at most, so that a stall is not remembered for hours
LOAD_WEIGHT = 0.2  # of one run of a graph in the device's load
IDLE_WEIGHT = 0.01  # of one run in the graph's idle latency: nearly all change is a change of load


class Average:
    """Exponentially weighted mean that starts at `prior` and leaves it with the first observation."""

    def __init__(self, prior: float, weight: float = 0.1) -> None:
        self._weight = weight
        self._count = 0
        self.value = prior

    @property
    def measured(self) -> bool:
        """Whether anything was observed."""
        return self._count > 0

    def observe(self, value: float) -> None:
        self._count += 1
        self.value += (value - self.value) * max(self._weight, 1 / self._count)


class GuardedAverage(Average):
    """An average that no single outlier moves, and that a lasting change replaces after two or three observations."""

    def __init__(self, prior: float, weight: float = 0.1, *, trusted: bool = False) -> None:
        """`trusted`: the prior is a measurement, which the first observations do not replace."""
        super().__init__(prior, weight)
        self._count = self._first = FIRST if trusted else 0
        self._last: deque[float] = deque(maxlen=RECENT)
        self._test = ChangeTest()

    @property
    def spread(self) -> float:
        """Relative standard deviation of one observation."""
        return self._test.spread

    def observe(self, value: float) -> None:
        self._last.append(value)
        if self._first < FIRST:
            self._first += 1
            self._count, self.value = 1, median_low(self._last)
            return
        verdict = self._test.observe(math.log((value + SMALLEST) / (self.value + SMALLEST)))
        if verdict == "changed":
            latest = list(self._last)[-self._test.run :]
            self._count, self.value = len(latest), fmean(latest)
        elif verdict == "usual":
            super().observe(value)


class DeviceLoad:
    """Current latency of graphs over their idle latency: one factor for all, be it of heat or of other work."""

    def __init__(self) -> None:
        self._average = GuardedAverage(1.0, LOAD_WEIGHT, trusted=True)
        self.observed_s: float | None = None  # when a graph last ran

    @property
    def value(self) -> float:
        return self._average.value

    @property
    def spread(self) -> float:
        """Relative standard deviation of one run."""
        return self._average.spread

    def observe(self, load: float, now_s: float) -> None:
        """One run took `load` times its idle latency."""
        self._average.observe(min(load, MOST_LOAD))
        self.observed_s = now_s


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

    @property
    def spread(self) -> float:
        """Relative standard deviation of one run."""
        return self._load.spread

    def calibrate(self, seconds: float) -> None:
        """Record a run on an otherwise idle device, in seconds."""
        self._idle.observe(seconds)

    def observe(self, seconds: float, now_s: float) -> None:
        """Record a run in service, in seconds."""
        idle_s = max(self._idle.value, 1e-9)
        self._load.observe(seconds / idle_s, now_s)
        usual_s = min(seconds / max(self._load.value, 1e-9), 2 * idle_s)
        self._idle.value = idle_s + IDLE_WEIGHT * (usual_s - idle_s)
