from __future__ import annotations

import numpy as np
import pytest

from isthmus.models.recipes.common.fit_contexts import ratio


@pytest.mark.parametrize(
    ("across", "down", "near"), [(1, 0, (1, 0)), (0, 1, (0, 1)), (1, 1, (1, 1)), (0.3, 0.15, (2, 1))]
)
def test_the_direction_that_explains_more_counts_more(across: float, down: float, near: tuple[int, int]) -> None:
    sums_M2 = np.random.default_rng(0).normal(size=(1000, 2))
    assert ratio(sums_M2, sums_M2 @ [across, down]) == near
