"""When to measure what the plans do not use: requests sent in spite of their estimates, and probes. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable

EXPLORE_EVERY, EXPLORE_AT_MOST = 5, 80  # excluded requests before one is sent; the interval doubles up to the second
EXPLORE_AGE_S = 30.0  # after this long without exploration the next excluded request is sent

PROBE_AGE_S = 30.0  # without a measurement, after which a link that plans depend on is probed
PROBE_GAP_S = 1.0  # between probes, however often the link changes
BURST_S = 900.0  # a quarter of an hour's bytes may be spent at once: changes come in groups
HOUR_S = 3600.0
PROBE_BYTES_PER_HOUR = 256 << 10  # about fourteen measurements, of 18 KB each

MEASURING_SHARE = 0.25  # of what a budget has left: measuring a link must leave enough to use it

Spend = Callable[[int, float], bool]  # bytes, and the share of what is left that they may take


def always(size: int, share: float) -> bool:
    """Any number of bytes may be spent."""
    return True


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


class ProbeSchedule:
    """When a link is probed that requests do not measure: it changed, or is planned with and was not used for long.

    The bytes an hour are bounded, and `spend` may refuse them: it is asked before anything is sent.
    """

    def __init__(self, bytes_per_hour: float = PROBE_BYTES_PER_HOUR, spend: Spend = always) -> None:
        self._bytes_per_s = bytes_per_hour / HOUR_S
        self._left = self._burst = BURST_S * self._bytes_per_s
        self._filled_s = self._probed_s = self._planned_s = -math.inf
        self._changes = 0  # of the link, when it was last probed
        self.spend = spend

    def planned(self, now_s: float) -> None:
        """A request was planned with the estimate of the link, whether it is sent or not."""
        self._planned_s = now_s

    def due(self, age_s: float, changes: int, now_s: float) -> bool:
        """Whether to probe a link that was measured `age_s` ago and has changed so many times."""
        if now_s - self._probed_s < PROBE_GAP_S:
            return False
        if changes > self._changes:
            return True
        return min(age_s, now_s - self._probed_s) >= PROBE_AGE_S and now_s - self._planned_s < PROBE_AGE_S

    def take(self, size: int, changes: int, now_s: float) -> bool:
        """Spend `size` bytes on a probe, if they are left and may be spent; either way none is due for a while."""
        if self._filled_s > -math.inf:
            self._left = min(self._left + (now_s - self._filled_s) * self._bytes_per_s, self._burst)
        self._filled_s = self._probed_s = now_s
        if size > self._left or not self.spend(size, MEASURING_SHARE):
            return False
        self._left -= size
        self._changes = changes
        return True
