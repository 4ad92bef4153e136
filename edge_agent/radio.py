"""The radio of a device, as far as its energy depends on when it last sent; and what probes over it pay."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from isthmus.edge_agent.ledger import Ledger
from isthmus.edge_agent.policy.budgets import Spend
from isthmus.edge_agent.policy.prices import CostProfile


class Radio:
    """When the device last sent anything: until then its radio was awake."""

    def __init__(self) -> None:
        self._sent_s = -math.inf

    def since_s(self) -> float:
        """Seconds since then; infinite before the first."""
        return time.monotonic() - self._sent_s

    def sends(self) -> float:
        """It sends now. Returns the seconds since the last time."""
        since_s, self._sent_s = self.since_s(), time.monotonic()
        return since_s


def probe_charge(ledger: Ledger, profile: CostProfile, radio: Radio) -> Callable[[int, float], bool]:
    """What a probe calls before it moves so many bytes both ways: whether the budgets allow it, and if so they pay.

    Its second argument is the share of what is left that it may take. Probes are no calls of a cloud.
    """

    def charge(size: int, share: float) -> bool:
        joules = profile.energy.radio_j(size, 0, radio.since_s())
        allowed = ledger.spend(Spend(size, profile.prices.usd(size, 0, 0), joules, 0.0), share)
        if allowed:
            radio.sends()
        return allowed

    return charge
