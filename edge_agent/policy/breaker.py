"""Circuit breaker: a cloud that fails is left alone, then probed, so that it costs no request after the first few.

closed --failures in a row--> open --probe answered--> half open --request answered--> closed
                               ^------------------------------------request failed------'
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

State = Literal["closed", "open", "half_open"]
STATES: tuple[State, ...] = ("closed", "open", "half_open")


@dataclass(frozen=True, slots=True)
class BreakerLimits:
    """`failures` in a row open it; probes follow after `first_s`, then twice as long each time, up to `last_s`."""

    failures: int = 3
    first_s: float = 0.5
    last_s: float = 10.0


class Breaker:
    """Starts open: the first probe decides whether there is a cloud."""

    def __init__(self, limits: BreakerLimits = BreakerLimits()) -> None:
        self._limits = limits
        self._failed = 0
        self._cooldown_s = limits.first_s
        self._trial = False
        self.state: State = "open"
        self.probe_at_s = float("-inf")

    def take(self) -> bool:
        """Whether a request may go to the cloud now; while half open, one at a time."""
        if self.state == "half_open" and not self._trial:
            self._trial = True
            return True
        return self.state == "closed"

    def succeeded(self) -> None:
        """A request was answered, whatever the answer."""
        if self.state != "open":
            self.state, self._failed, self._trial = "closed", 0, False
            self._cooldown_s = self._limits.first_s

    def failed(self, now_s: float) -> None:
        """A request met a dead, late or overloaded cloud."""
        self._failed += 1
        if self.state == "half_open" or (self.state == "closed" and self._failed >= self._limits.failures):
            self._open(now_s)

    def probed(self, answered: bool, now_s: float) -> None:
        """A probe came back, or did not."""
        if self.state != "open":
            return
        if answered:
            self.state, self._trial = "half_open", False
        else:
            self._open(now_s)

    def _open(self, now_s: float) -> None:
        self.state, self._failed, self._trial = "open", 0, False
        self.probe_at_s = now_s + self._cooldown_s
        self._cooldown_s = min(2 * self._cooldown_s, self._limits.last_s)
