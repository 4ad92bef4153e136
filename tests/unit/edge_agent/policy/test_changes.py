from __future__ import annotations

import math
import random

import pytest

from isthmus.edge_agent.policy.changes import ChangeTest, Verdict


def verdicts(*ratios: float, spread: float = 0.05) -> list[Verdict]:
    """Of observations that are so many times the prediction, after fifty that are as predicted but for `spread`."""
    rng, test = random.Random(0), ChangeTest()
    for _ in range(50):
        test.observe(rng.gauss(0, spread))
    return [test.observe(math.log(ratio)) for ratio in ratios]


@pytest.mark.parametrize("ratio", [1e-9, 0.25, 4.0, 1e9])
def test_one_outlier_is_no_change(ratio: float) -> None:
    assert verdicts(ratio, 1.0, 1.0) == ["outlier", "usual", "usual"]
    assert verdicts(*[ratio, *[1.0] * 11] * 10).count("changed") == 0


def test_three_slow_observations_or_two_quick_ones_are_a_change() -> None:
    assert verdicts(4.0, 4.0, 4.0, spread=0.0) == ["outlier", "outlier", "changed"]
    assert verdicts(0.25, 0.25, spread=0.0) == ["outlier", "changed"]


def test_a_small_change_takes_longer() -> None:
    found = verdicts(*[1.15] * 20)
    assert 3 <= found.index("changed") < 12


def test_the_run_tells_which_observations_are_of_the_new_value() -> None:
    rng, test = random.Random(1), ChangeTest()
    for _ in range(50):
        test.observe(rng.gauss(0, 0.05))
    while test.observe(math.log(1.5)) != "changed":
        pass
    assert 3 <= test.run <= 5


@pytest.mark.parametrize("spread", [0.01, 0.1, 0.5])
def test_noise_is_rarely_a_change(spread: float) -> None:
    rng, test = random.Random(2), ChangeTest()
    found = [test.observe(rng.gauss(0, spread)) for _ in range(20_000)]
    assert found.count("changed") <= 40
    assert test.spread == pytest.approx(max(spread, 0.05), rel=0.3)


def test_stalls_one_in_ten_are_rarely_a_change() -> None:
    rng, test = random.Random(3), ChangeTest()
    found = [test.observe(rng.gauss(0, 0.1) if rng.random() > 0.1 else 3.0) for _ in range(10_000)]
    assert found.count("changed") <= 60
