from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.edge_agent.policy.estimates import LinkEstimate, LinkEstimator

TRUE = LinkEstimate(rtt_s=0.040, bytes_per_s=250_000)


def taught(sizes: list[int], truth: LinkEstimate = TRUE, noise: float = 0.0) -> LinkEstimator:
    estimator, rng = LinkEstimator(), random.Random(0)
    for size in sizes:
        estimator.observe(size, truth.transfer_s(size) * (1 + rng.uniform(0, noise)), 0.0)
    return estimator


@pytest.mark.parametrize("rate", [8_000, 250_000, 10_000_000])
@pytest.mark.parametrize("rtt_s", [0.001, 0.04, 0.4])
def test_probe_and_uploads_reveal_the_link(rate: float, rtt_s: float) -> None:
    truth = LinkEstimate(rtt_s, rate)
    estimate = taught([10, 8192] * 3 + [300, 900, 7500] * 5, truth).at(0.0)
    for size in (10, 300, 8000):
        assert estimate.transfer_s(size) == pytest.approx(truth.transfer_s(size), rel=0.05)


def test_noise_is_averaged_out() -> None:
    estimate = taught([10, 8192] + [300, 900, 7500] * 30, noise=0.2).at(0.0)
    assert estimate.transfer_s(4000) == pytest.approx(1.1 * TRUE.transfer_s(4000), rel=0.1)


def test_uploads_of_one_size_leave_the_bandwidth_alone() -> None:
    estimator = taught([10, 8192] * 3)
    before = estimator.at(0.0).bytes_per_s
    for _ in range(500):
        estimator.observe(300, TRUE.transfer_s(300), 0.0)
    assert estimator.at(0.0).bytes_per_s == pytest.approx(before, rel=0.05)
    assert estimator.at(0.0).rtt_s == pytest.approx(TRUE.rtt_s, rel=0.05)


def test_a_slower_link_is_noticed() -> None:
    estimator = taught([10, 8192] * 3 + [300, 900] * 20)
    slow = LinkEstimate(0.2, 20_000)
    for size in [300, 900, 7500] * 40:
        estimator.observe(size, slow.transfer_s(size), 0.0)
    assert estimator.at(0.0).transfer_s(900) == pytest.approx(slow.transfer_s(900), rel=0.1)


def test_one_stall_does_not_make_a_slow_link() -> None:
    estimator = taught([10, 8192] * 3 + [300] * 50)
    estimator.observe(300, 30.0, 0.0)
    assert estimator.at(0.0).transfer_s(300) < 2 * TRUE.transfer_s(300)


def test_before_anything_was_seen_the_prior_speaks() -> None:
    assert replace(LinkEstimator(TRUE).at(0.0), spread=TRUE.spread) == TRUE


@given(st.lists(st.tuples(st.integers(0, 10**7), st.floats(-1, 100)), max_size=60))
def test_estimates_are_never_negative(seen: list[tuple[int, float]]) -> None:
    estimator = LinkEstimator()
    for size, seconds in seen:
        estimator.observe(size, seconds, 0.0)
    estimate = estimator.at(0.0)
    assert estimate.rtt_s >= 0
    assert estimate.bytes_per_s > 0
    assert estimate.transfer_s(1000) >= 0


@pytest.mark.parametrize("before", [2, 3, 10])
def test_a_stall_soon_after_the_first_probes_does_not_make_a_slow_link(before: int) -> None:
    estimator = taught([10, 8192, *[300] * 8][:before])
    estimator.observe(300, 10.0, 0.0)
    assert estimator.at(0.0).transfer_s(300) < 3 * TRUE.transfer_s(300)


def test_two_quick_exchanges_end_an_estimate_that_is_far_too_slow() -> None:
    estimator = taught([10, 8192] * 20, LinkEstimate(rtt_s=5.0, bytes_per_s=1_000))
    for _ in range(2):
        estimator.observe(300, TRUE.transfer_s(300), 0.0)
    assert estimator.at(0.0).transfer_s(300) == pytest.approx(TRUE.transfer_s(300))
    assert estimator.at(0.0).transfer_s(8192) < 2.0


def test_an_exchange_of_which_the_cloud_claims_more_than_all_says_nothing() -> None:
    estimator = taught([10, 8192] * 3)
    before = estimator.at(0.0)
    estimator.observe(300, -4294.0, 0.0)
    estimator.observe(300, 0.0, 0.0)
    assert estimator.at(0.0) == before
