from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.edge_agent.policy.estimates import (
    EXPLORE_AGE_S,
    EXPLORE_AT_MOST,
    EXPLORE_EVERY,
    Average,
    DeviceLoad,
    Exploration,
    GraphLatency,
    GuardedAverage,
    LinkEstimate,
    LinkEstimator,
)

TRUE = LinkEstimate(rtt_s=0.040, bytes_per_s=250_000)


def taught(sizes: list[int], truth: LinkEstimate = TRUE, noise: float = 0.0) -> LinkEstimator:
    estimator, rng = LinkEstimator(), random.Random(0)
    for size in sizes:
        estimator.observe(size, truth.transfer_s(size) * (1 + rng.uniform(0, noise)))
    return estimator


@pytest.mark.parametrize("rate", [8_000, 250_000, 10_000_000])
@pytest.mark.parametrize("rtt_s", [0.001, 0.04, 0.4])
def test_probe_and_uploads_reveal_the_link(rate: float, rtt_s: float) -> None:
    truth = LinkEstimate(rtt_s, rate)
    estimate = taught([10, 8192] * 3 + [300, 900, 7500] * 5, truth).estimate
    for size in (10, 300, 8000):
        assert estimate.transfer_s(size) == pytest.approx(truth.transfer_s(size), rel=0.05)


def test_noise_is_averaged_out() -> None:
    estimate = taught([10, 8192] + [300, 900, 7500] * 30, noise=0.2).estimate
    assert estimate.transfer_s(4000) == pytest.approx(1.1 * TRUE.transfer_s(4000), rel=0.1)


def test_uploads_of_one_size_leave_the_bandwidth_alone() -> None:
    estimator = taught([10, 8192] * 3)
    before = estimator.estimate.bytes_per_s
    for _ in range(500):
        estimator.observe(300, TRUE.transfer_s(300))
    assert estimator.estimate.bytes_per_s == pytest.approx(before, rel=0.05)
    assert estimator.estimate.rtt_s == pytest.approx(TRUE.rtt_s, rel=0.05)


def test_a_slower_link_is_noticed() -> None:
    estimator = taught([10, 8192] * 3 + [300, 900] * 20)
    slow = LinkEstimate(0.2, 20_000)
    for size in [300, 900, 7500] * 40:
        estimator.observe(size, slow.transfer_s(size))
    assert estimator.estimate.transfer_s(900) == pytest.approx(slow.transfer_s(900), rel=0.1)


def test_one_stall_does_not_make_a_slow_link() -> None:
    estimator = taught([10, 8192] * 3 + [300] * 50)
    estimator.observe(300, 30.0)
    assert estimator.estimate.transfer_s(300) < 2 * TRUE.transfer_s(300)


def test_before_anything_was_seen_the_prior_speaks() -> None:
    assert LinkEstimator(TRUE).estimate == TRUE


@given(st.lists(st.tuples(st.integers(0, 10**7), st.floats(-1, 100)), max_size=60))
def test_estimates_are_never_negative(seen: list[tuple[int, float]]) -> None:
    estimator = LinkEstimator()
    for size, seconds in seen:
        estimator.observe(size, seconds)
    estimate = estimator.estimate
    assert estimate.rtt_s >= 0
    assert estimate.bytes_per_s > 0
    assert estimate.transfer_s(1000) >= 0


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
        wide.observe(0.030)
    assert wide.value == pytest.approx(0.030, rel=0.05)
    assert narrow.value == pytest.approx(0.012, rel=0.2)


def test_an_idle_device_shows_too_whichever_graph_is_run() -> None:
    narrow, wide = graphs(0.004, 0.010)
    for _ in range(30):
        wide.observe(0.030)
    for _ in range(30):
        narrow.observe(0.004)
    assert wide.value == pytest.approx(0.010, rel=0.2)


def test_what_slows_one_graph_alone_ends_in_its_own_estimate() -> None:
    one, other = graphs(0.010, 0.010)
    for _ in range(300):
        one.observe(0.020)
        other.observe(0.010)
    assert one.value / other.value == pytest.approx(2, rel=0.1)


def test_one_stall_does_not_look_like_a_busy_device() -> None:
    narrow, wide = graphs(0.004, 0.010)
    wide.observe(60.0)
    assert narrow.value < 0.004 * 1.7 and wide.value < 0.010 * 1.8
    for _ in range(30):
        wide.observe(0.010)
    assert narrow.value == pytest.approx(0.004, rel=0.1)


@given(st.lists(st.tuples(st.integers(0, 1), st.floats(0, 100)), max_size=200))
def test_estimates_stay_finite_and_not_negative(runs: list[tuple[int, float]]) -> None:
    made = graphs(0.010, 0.0)
    for index, seconds in runs:
        made[index].observe(seconds)
    assert all(0 <= graph.value < 1e4 for graph in made)


@pytest.mark.parametrize("before", [2, 3, 10])
def test_a_stall_soon_after_the_first_probes_does_not_make_a_slow_link(before: int) -> None:
    estimator = taught([10, 8192, *[300] * 8][:before])
    estimator.observe(300, 10.0)
    assert estimator.estimate.transfer_s(300) < 3 * TRUE.transfer_s(300)


def test_two_quick_exchanges_end_an_estimate_that_is_far_too_slow() -> None:
    estimator = taught([10, 8192] * 20, LinkEstimate(rtt_s=5.0, bytes_per_s=1_000))
    for _ in range(2):
        estimator.observe(300, TRUE.transfer_s(300))
    assert estimator.estimate.transfer_s(300) == pytest.approx(TRUE.transfer_s(300))
    assert estimator.estimate.transfer_s(8192) < 2.0


def test_an_exchange_of_which_the_cloud_claims_more_than_all_says_nothing() -> None:
    estimator = taught([10, 8192] * 3)
    before = estimator.estimate
    estimator.observe(300, -4294.0)
    estimator.observe(300, 0.0)
    assert estimator.estimate == before


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


def test_a_guarded_average_falls_at_once_and_rises_slowly() -> None:
    assert guarded(*[100.0] * 20, 1.0, 1.0) == 1.0
    assert 1.0 < guarded(*[1.0] * 20, 2.0, 2.0) < 1.2
    assert guarded(*[1.0] * 20, *[2.0] * 60) == pytest.approx(2.0, rel=0.01)


def test_exploration_becomes_rarer_without_replies_and_starts_over_with_one() -> None:
    exploration = Exploration(0.0)
    sent = [index for index in range(1, 1000) if exploration.due(0.0)]
    gaps = [after - before for before, after in zip([0, *sent], sent, strict=False)]
    assert gaps[:5] == [EXPLORE_EVERY * 2**k for k in range(4)] + [EXPLORE_AT_MOST]
    assert set(gaps[4:]) == {EXPLORE_AT_MOST}
    exploration.replied()
    assert any([exploration.due(0.0) for _ in range(EXPLORE_EVERY)])


def test_exploration_is_due_after_a_pause() -> None:
    exploration = Exploration(0.0)
    assert not exploration.due(EXPLORE_AGE_S - 1)
    assert exploration.due(EXPLORE_AGE_S)
    assert not exploration.due(EXPLORE_AGE_S + 1)
