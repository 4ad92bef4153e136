"""Learn-then-test: promises that hold, and are not far from what can be promised."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.models.recipes.common.learn_then_test import (
    DELTA,
    accepted,
    betting_p,
    certify,
    samples_needed,
    upper_bound,
)


@pytest.mark.parametrize(("p_values", "count"), [([], 0), ([0.05, 0.1, 0.2, 0.01], 2), ([0.2], 0), ([float("nan")], 0)])
def test_thresholds_are_accepted_until_the_first_refusal(p_values: list[float], count: int) -> None:
    assert accepted(p_values) == count


def test_the_rest_of_a_sequence_is_not_looked_at() -> None:
    looked = iter([0.01, 0.5, 0.01])
    assert accepted(looked) == 1 and next(looked) == 0.01


@given(losses=st.lists(st.floats(0, 1), min_size=1, max_size=60), low=st.floats(0, 1), high=st.floats(0, 1))
def test_a_larger_epsilon_is_easier(losses: list[float], low: float, high: float) -> None:
    low, high = sorted((low, high))
    losses_N = np.array(losses)
    assert 0 <= betting_p(losses_N, high) <= betting_p(losses_N, low) <= 1


@given(losses=st.lists(st.floats(0, 1), min_size=1, max_size=60))
def test_the_bound_is_above_the_mean(losses: list[float]) -> None:
    losses_N = np.array(losses)
    bound = upper_bound(losses_N)
    assert losses_N.mean() <= bound <= 1 and (bound == 1 or betting_p(losses_N, bound) <= DELTA)


@pytest.mark.parametrize("shape", [(0.3, 10.0), (0.05, 0.95), (5.0, 5.0)])
def test_it_fails_at_most_as_often_as_it_says(shape: tuple[float, float]) -> None:
    rng, mean = np.random.default_rng(0), shape[0] / sum(shape)
    failed = sum(upper_bound(rng.beta(*shape, 80)) < mean for _ in range(300))
    assert failed / 300 <= DELTA


def test_it_needs_little_more_than_the_fewest_samples() -> None:
    """No test can promise epsilon from fewer samples without a loss than log(1 / delta) / epsilon."""
    for count in (100, 300, 1000):
        least = 1 - DELTA ** (1 / count)
        assert least < upper_bound(np.zeros(count)) < 1.3 * least


def test_certificates_get_no_better_towards_more_permissive_thresholds() -> None:
    """A threshold that looks better by chance, behind a refused one, is not reached."""
    losses = [np.full(200, value) for value in (0.0, 0.05, 0.01)]
    found = certify(losses)
    assert found[0] < found[1] == found[2] and found[1] > 0.05


def test_how_many_samples_would_do() -> None:
    losses_N = np.tile([0.0, 0.0, 0.004], 100)
    needed = samples_needed(losses_N, 0.005)
    assert needed is not None and 300 < needed < 1500
    assert betting_p(np.resize(losses_N, needed), 0.005) <= DELTA
    assert samples_needed(losses_N, 0.001) is None, "that is below the mean"
    assert samples_needed(losses_N, 0.5) == 300, "those that there are"
