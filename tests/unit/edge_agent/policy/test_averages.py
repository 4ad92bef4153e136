from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.edge_agent.policy.averages import Average, DeviceLoad, GraphLatency, GuardedAverage


def test_average_leaves_its_prior_at_once_and_then_moves_slowly() -> None:
    average = Average(prior=5.0, weight=0.1)
    assert average.value == 5.0
    average.observe(1.0)
    assert average.value == 1.0
    for _ in range(20):
        average.observe(1.0)
    average.observe(2.0)
    assert average.value == pytest.approx(1.1)


def graphs(*alone_s: float) -> list[GraphLatency]:
    """Graphs of one device, calibrated to take this long."""
    load = DeviceLoad()
    made = [GraphLatency(1.0, load) for _ in alone_s]
    for graph, seconds in zip(made, alone_s, strict=True):
        graph.calibrate(seconds)
    return made


def test_a_graph_starts_from_its_calibration() -> None:
    (graph,) = graphs(0.010)
    assert graph.value == pytest.approx(0.010)
    graph.calibrate(0.020)
    assert graph.value == pytest.approx(0.015)


def test_a_busy_device_shows_in_the_estimates_of_graphs_that_did_not_run() -> None:
    narrow, wide = graphs(0.004, 0.010)
    for _ in range(30):
        wide.observe(0.030, 0.0)
    assert wide.value == pytest.approx(0.030, rel=0.05)
    assert narrow.value == pytest.approx(0.012, rel=0.2)


def test_an_idle_device_shows_too_whichever_graph_is_run() -> None:
    narrow, wide = graphs(0.004, 0.010)
    for _ in range(30):
        wide.observe(0.030, 0.0)
    for _ in range(30):
        narrow.observe(0.004, 0.0)
    assert wide.value == pytest.approx(0.010, rel=0.2)


def test_what_slows_one_graph_alone_ends_in_its_own_estimate() -> None:
    one, other = graphs(0.010, 0.010)
    for _ in range(300):
        one.observe(0.020, 0.0)
        other.observe(0.010, 0.0)
    assert one.value / other.value == pytest.approx(2, rel=0.1)


def test_one_stall_does_not_look_like_a_busy_device() -> None:
    narrow, wide = graphs(0.004, 0.010)
    wide.observe(60.0, 0.0)
    assert narrow.value < 0.004 * 1.7 and wide.value < 0.010 * 1.8
    for _ in range(30):
        wide.observe(0.010, 0.0)
    assert narrow.value == pytest.approx(0.004, rel=0.1)


@given(st.lists(st.tuples(st.integers(0, 1), st.floats(0, 100)), max_size=200))
def test_estimates_stay_finite_and_not_negative(runs: list[tuple[int, float]]) -> None:
    made = graphs(0.010, 0.0)
    for index, seconds in runs:
        made[index].observe(seconds, 0.0)
    assert all(0 <= graph.value < 1e4 for graph in made)


def guarded(*values: float) -> float:
    average = GuardedAverage(prior=5.0)
    for value in values:
        average.observe(value)
    return average.value


def test_a_guarded_average_is_moved_by_no_single_outlier() -> None:
    assert guarded() == 5.0
    assert guarded(1.0) == 1.0
    assert guarded(1e6, 1.0) == guarded(1.0, 1e6) == guarded(1.0, 1.0, 1e6) == guarded(1.0, 1e6, 1.0) == 1.0
    assert guarded(*[1.0] * 20, 1e6) == guarded(*[1.0] * 20, 0.0) == 1.0


def test_a_guarded_average_follows_two_low_observations_or_three_high_ones() -> None:
    assert guarded(*[100.0] * 20, 1.0, 1.0) == 1.0
    assert guarded(*[1.0] * 20, 2.0, 2.0) == 1.0
    assert guarded(*[1.0] * 20, 2.0, 2.0, 2.0) == 2.0
    assert guarded(*[1.0] * 20, *[2.0] * 60) == pytest.approx(2.0, rel=0.01)
