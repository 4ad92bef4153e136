"""How many requests may be in flight to one cloud: more while they are answered, half as many when they are late.

Additive increase, multiplicative decrease (Chiu and Jain, 1989), as in TCP.
"""

from __future__ import annotations

FIRST, MOST = 8.0, 64.0  # requests; the service batches up to 16


class Window:
    """Grows by one request for each window of answers, and only while it is full."""

    def __init__(self) -> None:
        self._size = FIRST
        self._shrunk_s = float("-inf")

    @property
    def size(self) -> int:
        """Requests that may be in flight."""
        return int(self._size)

    def answered(self, full: bool) -> None:
        """A request was answered in time; `full`: as many were in flight as may be."""
        if full:
            self._size = min(self._size + 1 / self._size, MOST)

    def overloaded(self, sent_s: float, now_s: float) -> None:
        """A request was late or refused for want of room. Those sent before the last decrease add nothing to it."""
        if sent_s > self._shrunk_s:
            self._size, self._shrunk_s = max(self._size / 2, 1.0), now_s
