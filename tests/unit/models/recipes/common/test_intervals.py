from __future__ import annotations

import numpy as np
import pytest

from isthmus.models.recipes.common.intervals import interval


@pytest.mark.parametrize(
    ("right", "samples", "low", "high"),
    [(8, 10, 0.4902, 0.9433), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (450, 500, 0.8706, 0.9234)],
)
def test_intervals_are_wilsons(right: int, samples: int, low: float, high: float) -> None:
    found = interval(np.arange(samples) < right)
    assert (found.value, found.samples) == (right / samples, samples)
    assert (found.low, found.high) == (pytest.approx(low, abs=1e-4), pytest.approx(high, abs=1e-4))
