"""Circuit breaker: after a few failures no request goes to the cloud until a probe has found it again.

closed --failures in a row--> open --probe answered--> half open --request answered--> closed
                               ^------------------------------------request failed------'

A refusal that every request would meet, or a check without an answer, opens it at once. A cloud that is overloaded is
not lost: that is for the window of requests in flight (`window`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

State = Literal["closed", "open", "half_open"]
STATES: tuple[State, ...] = ("closed", "open", "half_open")
WORDS: dict[State, str] = {"closed": "connected", "half_open": "answering again", "open": "unreachable"}  # for people


@dataclass(frozen=True, slots=True)
class BreakerLimits:
    """`failures` in a row open it. Probes wait `first_s`, then twice as long each time, up to `last_s`."""

    failures: int = 3
    first_s: float = 0.5
    last_s: float = 10.0


class Breaker:
    """Starts open: the first probe decides whether the cloud may be used."""

    def __init__(self, limits: BreakerLimits = BreakerLimits()) -> None:
        self._limits = limits
        self._failed = 0
        self._cooldown_s = limits.first_s
        self._trial = False
        self._counted_s = float("-inf")  # when the last failure was counted
        self.state: State = "open"
        self.probe_at_s = float("-inf")

    def allow_request(self) -> bool:
        """Whether a request may be sent now. Half open, it admits one trial request at a time."""
        if self.state == "half_open" and not self._trial:
            self._trial = True
            return True
        return self.state == "closed"

    def record_success(self) -> None:
        """A request was answered, if only with an error of the caller."""
        if self.state != "open":
            self.state, self._failed, self._trial = "closed", 0, False
            self._cooldown_s = self._limits.first_s

    def record_failure(self, now_s: float, sent_s: float = math.inf) -> None:
        """A request, sent then, failed because the cloud is down or late.

        Requests in flight together fail together: one that was sent before the last failure says nothing new.
        """
        if sent_s < self._counted_s:
            return
        self._counted_s = now_s
        self._failed += 1
        if self.state == "half_open" or (self.state == "closed" and self._failed >= self._limits.failures):
            self._open(now_s)

    def record_nothing(self) -> None:
        """An admitted request says nothing about the cloud: it was not sent, or had too little time to be answered."""
        self._trial = False

    def trip(self, now_s: float) -> None:
        """The cloud refuses every request, or is lost: open at once. Ignored if open."""
        if self.state != "open":
            self._open(now_s)

    def record_probe(self, answered: bool, now_s: float) -> None:
        """A probe was answered, or failed. Ignored unless open."""
        if self.state != "open":
            return
        if answered:
            self.state, self._trial = "half_open", False
        else:
            self._open(now_s)

    def _open(self, now_s: float) -> None:
        self.state, self._failed, self._trial = "open", 0, False
        self._counted_s = now_s
        self.probe_at_s = now_s + self._cooldown_s
        self._cooldown_s = min(2 * self._cooldown_s, self._limits.last_s)
