from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.models.recipes.vision.calibrate import DELTA, GRID, NEVER, certify, first_exit


def tail_probability(losses: int, samples: int, epsilon: float) -> float:
    """P(at most `losses` of `samples`) at a true rate of `epsilon`, term by term."""
    terms = (math.comb(samples, k) * epsilon**k * (1 - epsilon) ** (samples - k) for k in range(losses + 1))
    return math.fsum(terms)


def certified_by_hand(
    confidence: list[list[float]], right: list[list[bool]], cloud: list[bool], epsilon: float
) -> float:
    """The threshold that a plain loop over inputs and exits accepts last."""
    accepted = NEVER
    for threshold in GRID:
        losses = 0
        for n, cloud_right in enumerate(cloud):
            taken = next((e for e, row in enumerate(confidence) if np.float32(row[n]) >= np.float32(threshold)), None)
            losses += taken is not None and cloud_right and not right[taken][n]
        if tail_probability(losses, len(cloud), epsilon) > DELTA:
            return accepted
        accepted = threshold
    return accepted


@given(seed=st.integers(0, 1 << 32), epsilon=st.sampled_from([0.005, 0.01, 0.03, 0.05, 0.2]))
@settings(max_examples=15)
def test_certificates_are_those_of_a_plain_loop(seed: int, epsilon: float) -> None:
    rng = np.random.default_rng(seed)
    samples = int(rng.integers(20, 300))
    confidence_EN = rng.beta(4, 1, (2, samples)).astype(np.float32)
    exit_right_EN = rng.random((2, samples)) < confidence_EN
    cloud_right_N = rng.random(samples) < 0.9
    (found,) = certify(confidence_EN, exit_right_EN, cloud_right_N, [epsilon])
    wanted = certified_by_hand(confidence_EN.tolist(), exit_right_EN.tolist(), cloud_right_N.tolist(), epsilon)
    assert found.confidence == wanted


def test_nothing_is_certified_past_the_first_refusal() -> None:
    """50 of 200 inputs leave wrongly at exit 1 from 0.99 down, and rightly at exit 0 from 0.9 down."""
    confidence_EN = np.full((2, 200), 0.1, np.float32)
    confidence_EN[0, :50], confidence_EN[1, :50] = 0.9, 0.991
    exit_right_EN = np.ones((2, 200), bool)
    exit_right_EN[1] = False
    (found,) = certify(confidence_EN, exit_right_EN, np.ones(200, bool), [0.05])
    assert (found.confidence, found.coverage, found.loss) == (0.995, 0.0, 0.0)


def test_too_few_samples_certify_nothing() -> None:
    ones = np.ones((1, 10))
    (found,) = certify(ones.astype(np.float32), ones.astype(bool), np.ones(10, bool), [0.005])
    assert (found.confidence, found.coverage, found.loss, found.samples) == (NEVER, 0.0, 0.0, 10)


@pytest.mark.parametrize(
    ("samples", "smallest"), [(10_000, 0.005), (460, 0.005), (400, 0.006), (100, 0.023), (20, 0.109)]
)
def test_the_smallest_epsilon_that_so_few_samples_certify_is_among_them(samples: int, smallest: float) -> None:
    ones = np.full((1, samples), 0.99, np.float32)
    found = certify(ones, ones > 0, np.ones(samples, bool))
    assert smallest in [threshold.epsilon for threshold in found]
    for threshold in found:
        assert (threshold.coverage == 1 and threshold.confidence <= 1) == (threshold.epsilon >= smallest)


def test_an_exit_that_is_never_wrong_is_certified_all_the_way_down() -> None:
    confidence_EN = np.linspace(0.4, 1, 500, dtype=np.float32)[None]
    (found,) = certify(confidence_EN, np.ones((1, 500), bool), np.ones(500, bool), [0.01])
    assert found.confidence == GRID[-1]
    assert found.coverage == pytest.approx(np.mean(confidence_EN >= GRID[-1]))


def test_losing_what_the_cloud_would_lose_too_is_no_loss() -> None:
    confidence_EN, wrong = np.full((1, 500), 0.99, np.float32), np.zeros(500, bool)
    (found,) = certify(confidence_EN, wrong[None], wrong, [0.01])
    assert (found.confidence, found.coverage, found.loss) == (GRID[-1], 1.0, 0.0)


@given(seed=st.integers(0, 1 << 32))
@settings(max_examples=10)
def test_a_larger_allowance_never_exits_less(seed: int) -> None:
    rng = np.random.default_rng(seed)
    confidence_EN = rng.beta(5, 1, (2, 400)).astype(np.float32)
    exit_right_EN = rng.random((2, 400)) < confidence_EN**0.5
    found = certify(confidence_EN, exit_right_EN, rng.random(400) < 0.9, [0.005, 0.01, 0.02, 0.05, 0.1, 0.3])
    confidences = [threshold.confidence for threshold in found]
    assert confidences == sorted(confidences, reverse=True)


def test_the_first_confident_exit_is_taken() -> None:
    confidence_EN = np.array([[0.9, 0.5, 0.1], [0.9, 0.9, 0.1]], np.float32)
    assert first_exit(confidence_EN, 0.8).tolist() == [0, 1, 2]
