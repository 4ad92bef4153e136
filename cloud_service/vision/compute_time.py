"""Predicts how long a batch takes from how long earlier ones took. Pure: knows no clock."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable

MEMORY = 32  # batches of a kind that are remembered, so that a size not seen for long is predicted from newer ones
COMPARED = 5  # of them, the nearest in size, are compared


class ComputeTimes:
    """Seconds that a batch of a kind will take, by its size.

    The second longest of the last batches nearest in size, scaled to the size: most batches take no longer, and a
    single outlier changes nothing. Nothing is known before the first batch of a kind, which counts as no time at all.
    """

    def __init__(self) -> None:
        self._last: dict[Hashable, deque[tuple[int, float]]] = {}  # (size, seconds) of each kind, the last one first
        self._known: dict[tuple[Hashable, int], float] = {}

    def observe(self, key: Hashable, size: int, seconds: float) -> None:
        """Record a batch of `size` inputs."""
        self._last.setdefault(key, deque(maxlen=MEMORY)).appendleft((size, seconds))
        self._known.clear()

    def predict(self, key: Hashable, size: int) -> float:
        """Seconds of a batch of `size` inputs."""
        if (key, size) not in self._known:
            nearest = sorted(self._last.get(key, ()), key=lambda batch: abs(batch[0] - size))[:COMPARED]
            scaled = sorted(seconds * size / batch_size for batch_size, seconds in nearest)
            self._known[key, size] = scaled[max(len(scaled) - 2, 0)] if scaled else 0.0
        return self._known[key, size]
