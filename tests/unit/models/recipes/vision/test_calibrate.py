from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from isthmus.models.recipes.common.learn_then_test import DELTA
from isthmus.models.recipes.vision.calibrate import (
    GRID,
    STARTS,
    Answers,
    calibrate,
    certify,
    common_path,
    first_exit,
    own_path,
    score_at,
)
from isthmus.models.recipes.vision.correctness import choose_scores, fit_platt
from isthmus.models.vision.manifest import NEVER, Threshold

CLASSES = 12
Floats = NDArray[np.float32]
Bools = NDArray[np.bool_]


def answers_of(confidence_EN: Floats, right_EN: Bools, cloud_right_N: Bools) -> Answers:
    """Exits that answer class 0 with these confidences where they are right, else class 1; the cloud 0, else 2."""
    exits, samples = confidence_EN.shape
    rest_EN = (1 - confidence_EN) / (CLASSES - 1)
    exits_ENK = np.repeat(rest_EN[..., None], CLASSES, axis=2).astype(np.float32)
    np.put_along_axis(exits_ENK, np.where(right_EN, 0, 1)[..., None], confidence_EN[..., None], axis=2)
    assert exits_ENK.shape == (exits, samples, CLASSES)
    return Answers(exits_ENK, np.zeros(samples, np.int64), np.where(cloud_right_N, 0, 2))


def certified(
    confidence_EN: Floats, right_EN: Bools, cloud_right_N: Bools, epsilons: list[float] | None = None
) -> list[Threshold]:
    """Certificates about accuracy among all inputs, with one threshold for all exits."""
    answers = answers_of(confidence_EN, right_EN, cloud_right_N)
    exits = len(confidence_EN)
    found = certify(answers, (None,) * exits, common_path(exits), epsilons)
    return [each for each in found if (each.promise, each.among) == ("accuracy", "all")]


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
        losses = exited = 0
        for n, cloud_right in enumerate(cloud):
            taken = next((e for e, row in enumerate(confidence) if row[n] >= threshold), None)
            exited += taken is not None
            losses += taken is not None and cloud_right and not right[taken][n]
        if tail_probability(losses, len(cloud), epsilon) > DELTA:
            return accepted
        accepted = threshold if exited else NEVER  # a step at which nobody leaves is as good as none
    return accepted


@given(seed=st.integers(0, 1 << 32), epsilon=st.sampled_from([0.005, 0.01, 0.03, 0.05, 0.2]))
@settings(max_examples=15)
def test_certificates_are_those_of_a_plain_loop(seed: int, epsilon: float) -> None:
    rng = np.random.default_rng(seed)
    samples = int(rng.integers(20, 300))
    confidence_EN = rng.beta(4, 1, (2, samples)).clip(0.2).astype(np.float32)
    exit_right_EN = rng.random((2, samples)) < confidence_EN
    cloud_right_N = rng.random(samples) < 0.9
    (found,) = certified(confidence_EN, exit_right_EN, cloud_right_N, [epsilon])
    wanted = certified_by_hand(confidence_EN.tolist(), exit_right_EN.tolist(), cloud_right_N.tolist(), epsilon)
    assert found.confidences == (wanted, wanted)


def test_nothing_is_certified_past_the_first_refusal() -> None:
    """50 of 200 inputs leave wrongly at exit 1 from 0.99 down, and rightly at exit 0 from 0.9 down."""
    confidence_EN = np.full((2, 200), 0.1, np.float32)
    confidence_EN[0, :50], confidence_EN[1, :50] = 0.9, 0.991
    exit_right_EN = np.ones((2, 200), bool)
    exit_right_EN[1] = False
    (found,) = certified(confidence_EN, exit_right_EN, np.ones(200, bool), [0.05])
    assert (found.confidences, found.coverage, found.loss) == ((NEVER, NEVER), 0.0, 0.0)


def test_too_few_samples_certify_nothing() -> None:
    ones = np.ones((1, 10))
    (found,) = certified(ones.astype(np.float32), ones.astype(bool), np.ones(10, bool), [0.005])
    assert (found.confidences, found.coverage, found.loss, found.samples) == ((NEVER,), 0.0, 0.0, 10)


@pytest.mark.parametrize(
    ("samples", "smallest"), [(10_000, 0.005), (460, 0.005), (400, 0.006), (100, 0.023), (20, 0.109)]
)
def test_the_smallest_epsilon_that_so_few_samples_certify_is_among_them(samples: int, smallest: float) -> None:
    ones = np.full((1, samples), 0.99, np.float32)
    found = certified(ones, ones > 0, np.ones(samples, bool))
    assert smallest in [threshold.epsilon for threshold in found]
    for threshold in found:
        assert (threshold.coverage == 1 and threshold.answers) == (threshold.epsilon >= smallest)


def test_an_exit_that_is_never_wrong_is_certified_all_the_way_down() -> None:
    confidence_EN = np.linspace(0.4, 1, 500, dtype=np.float32)[None]
    (found,) = certified(confidence_EN, np.ones((1, 500), bool), np.ones(500, bool), [0.01])
    assert found.confidences == (GRID[-1],)
    assert found.coverage == pytest.approx(np.mean(confidence_EN >= GRID[-1]))
    assert (found.accuracy, found.agreement) == (1.0, 1.0)


def test_losing_what_the_cloud_would_lose_too_is_no_loss_of_accuracy_but_another_answer() -> None:
    confidence_EN, wrong = np.full((1, 500), 0.99, np.float32), np.zeros(500, bool)
    answers = answers_of(confidence_EN, wrong[None], wrong)
    by_kind = {(each.promise, each.among): each for each in certify(answers, (None,), common_path(1), [0.01])}
    found = by_kind["accuracy", "all"]
    assert (found.confidences, found.coverage, found.loss) == ((GRID[-1],), 1.0, 0.0)
    assert not by_kind["agreement", "all"].answers and not by_kind["agreement", "exited"].answers


@given(seed=st.integers(0, 1 << 32))
@settings(max_examples=10)
def test_a_larger_allowance_never_exits_less(seed: int) -> None:
    rng = np.random.default_rng(seed)
    confidence_EN = rng.beta(5, 1, (2, 400)).clip(0.2).astype(np.float32)
    exit_right_EN = rng.random((2, 400)) < confidence_EN**0.5
    answers = answers_of(confidence_EN, exit_right_EN, rng.random(400) < 0.9)
    found = certify(answers, (None, None), common_path(2), [0.005, 0.01, 0.02, 0.05, 0.1, 0.3])
    for kind in {(each.promise, each.among) for each in found}:
        confidences = [each.confidences for each in found if (each.promise, each.among) == kind]
        assert confidences == sorted(confidences, reverse=True)


def test_what_a_few_that_leave_lose_counts_among_them_alone() -> None:
    """Of 2,000 inputs 200 leave and 20 of them lose: 1 % of all, but 10 % of those."""
    confidence_EN = np.full((1, 2000), 0.3, np.float32)
    confidence_EN[0, :200] = 0.95
    right_EN = np.ones((1, 2000), bool)
    right_EN[0, :20] = False
    answers = answers_of(confidence_EN, right_EN, np.ones(2000, bool))
    found = certify(answers, (None,), common_path(1), [0.02, 0.2])
    at = {(each.among, each.epsilon): each for each in found if each.promise == "accuracy"}
    assert at["all", 0.02].answers and at["all", 0.02].loss == 0.01
    assert not at["exited", 0.02].answers
    assert at["exited", 0.2].answers and at["exited", 0.2].loss == 0.1
    assert tail_probability(20, 200, 0.2) <= DELTA / STARTS


def test_the_first_confident_exit_is_taken() -> None:
    confidence_EN = np.array([[0.9, 0.5, 0.1], [0.9, 0.9, 0.1]], np.float32)
    assert first_exit(confidence_EN, (0.8, 0.8)).tolist() == [0, 1, 2]
    assert first_exit(confidence_EN, (NEVER, 0.8)).tolist() == [1, 1, 2]


def unequal(samples: int, seed: int) -> Answers:
    """Exit 0 is much too sure of itself, exit 1 is as often right as it says."""
    rng = np.random.default_rng(seed)
    confidence_EN = rng.beta(6, 1, (2, samples)).clip(0.2).astype(np.float32)
    right_EN = rng.random((2, samples)) < np.stack([confidence_EN[0] ** 4, confidence_EN[1]])
    return answers_of(confidence_EN, right_EN, np.ones(samples, bool))


def test_each_exit_has_a_threshold_of_its_own_where_samples_suffice() -> None:
    found = calibrate(unequal(4000, seed=0))
    for each in found.thresholds:
        assert each.samples == 3200, "what chooses does not certify"
        assert not each.answers or each.confidences[0] > each.confidences[1]
    assert any(each.answers for each in found.thresholds)
    few = calibrate(unequal(2000, seed=0))
    assert {each.samples for each in few.thresholds} == {2000}
    assert all(len(set(each.confidences)) == 1 for each in few.thresholds)


def test_samples_that_choose_can_be_given() -> None:
    found = calibrate(unequal(300, seed=0), design=unequal(800, seed=1))
    assert {each.samples for each in found.thresholds} == {300}
    assert all(len(set(each.confidences)) == 2 for each in found.thresholds if each.answers)


def test_a_path_rises_in_risk_and_falls_in_confidence() -> None:
    path = np.array(own_path(unequal(3000, seed=2), (None, None)))
    assert (np.diff(path, axis=0) <= 0).all() and (path >= 0).all()
    assert path[0].tolist() == [NEVER, NEVER] or path[0].max() > 0.9


def test_platts_scaling_finds_the_chance_of_a_loss() -> None:
    rng = np.random.default_rng(0)
    score_N = rng.uniform(0.05, 0.95, 20_000)
    bias, slope = fit_platt(score_N, rng.random(20_000) >= score_N)
    assert (bias, slope) == (pytest.approx(0, abs=0.1), pytest.approx(-1, abs=0.1))
    assert score_at(0.1, 0.0, -1.0) == pytest.approx(0.9) and score_at(0.1, 0.0, 1.0) == NEVER


def test_a_correctness_head_is_taken_where_it_ranks_better_and_only_there() -> None:
    """Exit 1's confidence says nothing; whether it agrees with exit 0 says all."""
    rng = np.random.default_rng(0)
    samples = 600
    right_N = rng.random(samples) < 0.7
    confidence_EN = np.stack([np.full(samples, 0.6), rng.uniform(0.5, 0.9, samples)]).astype(np.float32)
    answers = answers_of(confidence_EN, np.stack([np.ones(samples, bool), right_N]), np.ones(samples, bool))
    first, second = choose_scores(answers.exits_ENK, answers.labels_N, answers.cloud_N)
    assert first is None, "it loses nothing, so nothing can be learned"
    assert second is not None and second.weights[3] > 0
    noise = answers_of(confidence_EN, rng.random((2, samples)) < confidence_EN, np.ones(samples, bool))
    assert choose_scores(noise.exits_ENK, noise.labels_N, noise.cloud_N) == (None, None)
