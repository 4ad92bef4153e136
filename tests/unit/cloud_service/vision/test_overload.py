"""Goodput and fairness of the planning under more load than can be computed, in virtual time."""

from __future__ import annotations

import pytest

from tests.unit.cloud_service.vision.load import Load, poisson

SECONDS, BUDGET_S = 20.0, 1.0
PEERS = tuple(f"device {number}" for number in range(8))


def capacity(load: Load, size: int = 4) -> float:
    """Inputs a second in batches of `size`."""
    return size / (load.fixed_s + size * load.each_s)


@pytest.mark.parametrize("times", [1.5, 2.0, 4.0])
@pytest.mark.parametrize("budget_s", [0.2, BUDGET_S])
def test_goodput_stays_near_capacity_under_overload(times: float, budget_s: float) -> None:
    """In order of arrival until no time was left it was 0.00 of the capacity at twice the load."""
    load = Load(0.002, 0.020, budget_s)
    load.run(poisson(times * capacity(load), SECONDS, PEERS, seed=1))
    outcomes = list(load.outcomes.values())
    assert sum(len(outcome.latency_s) for outcome in outcomes) / SECONDS > 0.9 * capacity(load)
    assert sum(outcome.late for outcome in outcomes) < 0.02 * sum(len(outcome.latency_s) for outcome in outcomes)
    assert sum(outcome.dropped for outcome in outcomes) < 0.1 * sum(outcome.refused for outcome in outcomes)


@pytest.mark.parametrize(("fixed_s", "each_s"), [(0.02, 0.0002), (0.0, 0.15)])
def test_goodput_of_networks_that_gain_much_or_nothing_from_batches(fixed_s: float, each_s: float) -> None:
    load = Load(fixed_s, each_s, BUDGET_S)
    full = capacity(load, 16)
    seconds = 1000 / full
    load.run(poisson(2 * full, seconds, PEERS, seed=2))
    assert sum(len(outcome.latency_s) for outcome in load.outcomes.values()) / seconds > 0.85 * full


def test_a_light_load_loses_nothing() -> None:
    load = Load(0.002, 0.020, BUDGET_S)
    arrivals = poisson(0.5 * capacity(load), SECONDS, PEERS, seed=3)
    load.run(arrivals)
    assert sum(len(outcome.latency_s) for outcome in load.outcomes.values()) == len(arrivals)


def test_neighbours_with_many_inputs_delay_nobody_for_long() -> None:
    """Beside one peer with 64 inputs in flight the 99th percentile of the others rose from 63 to 895 ms."""
    load = Load(0.002, 0.020, 10.0)
    load.times.observe("k", 1, 0.022)
    greedy = [(0.5 * second, f"greedy {peer}") for second in range(40) for peer in range(3) for _ in range(64)]
    light = [(0.37 * number, "light") for number in range(54)]
    load.run(sorted([*greedy, *light]))
    outcome = load.outcomes["light"]
    assert (outcome.late, outcome.refused, outcome.dropped) == (0, 0, 0)
    assert outcome.quantile_s(0.99) < 0.25
    assert all(load.outcomes[f"greedy {peer}"].refused for peer in range(3))
    shares = [len(load.outcomes[f"greedy {peer}"].latency_s) for peer in range(3)]
    assert max(shares) < 1.1 * min(shares)


def test_an_estimate_that_is_far_too_high_is_corrected() -> None:
    load = Load(0.002, 0.020, BUDGET_S)
    for _ in range(40):
        load.times.observe("k", 4, 60.0)
    load.run(poisson(0.5 * capacity(load), SECONDS, PEERS, seed=5))
    assert sum(len(outcome.latency_s) for outcome in load.outcomes.values()) / SECONDS > 0.4 * capacity(load)
