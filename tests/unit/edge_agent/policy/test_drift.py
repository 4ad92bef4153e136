"""The bets on ranks: what they win without a shift and after one, for one stream and for many."""

import numpy as np
import pytest

from isthmus.edge_agent.policy.drift import FIRST, MOST_STATISTICS, DriftGate, statistics

STREAMS, STATISTICS = 40, 5


def seen(gate: DriftGate, random: np.random.Generator, inputs: int, shift: float = 0.0) -> np.ndarray:
    """Whether each of STREAMS has alarmed after so many inputs, of which the last statistic is shifted."""
    alarmed = np.zeros(STREAMS, bool)
    for _ in range(inputs):
        row = random.normal(size=(STREAMS, STATISTICS))
        row[:, -1] += shift
        gate.observe(row)
        alarmed |= gate.alarm
    return alarmed


@pytest.mark.parametrize("shift", [1.0, -1.0])
def test_a_shift_of_one_statistic_is_seen_and_nothing_before_it(shift: float) -> None:
    gate, random = DriftGate(), np.random.default_rng(0)
    assert not seen(gate, random, FIRST + 800).any()
    assert seen(gate, random, 300, shift).all()


def test_a_rank_is_uniform_so_that_the_capital_does_not_grow() -> None:
    gate, random = DriftGate(), np.random.default_rng(1)
    seen(gate, random, FIRST + 400)
    assert gate.capital.mean() < 3, "1 on average after HORIZON inputs"


def test_values_that_are_all_the_same_are_no_shift() -> None:
    gate = DriftGate()
    for _ in range(FIRST + 500):
        gate.observe(np.zeros(3))
    assert not gate.alarm


def test_streams_at_once_are_those_one_by_one() -> None:
    rows = np.random.default_rng(2).normal(size=(FIRST + 50, 1, 3))
    one, many = DriftGate(3), DriftGate(3)
    for row in rows:
        one.observe(row[0])
        many.observe(row)
    assert many.capital.tolist() == [pytest.approx(float(one.capital))]


def test_statistics_of_maps_and_of_tokens() -> None:
    maps = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    assert statistics(maps, 0.5).tolist() == [5.5, 17.5, 0.5]
    assert statistics(np.array([[1.0, 2.0], [3.0, 6.0]]), 0.25).tolist() == [2.0, 4.0, 0.25]
    assert MOST_STATISTICS / 2 < len(statistics(np.zeros((130, 2, 2)), 0.0)) <= MOST_STATISTICS
