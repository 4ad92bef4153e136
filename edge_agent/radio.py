"""The radio of a device, as far as its energy depends on when it last sent."""

from __future__ import annotations

import math
import time


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
