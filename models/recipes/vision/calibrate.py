"""Certified thresholds of exits, by learn-then-test.

    design samples      -> what each exit is judged by, and a path of thresholds, conservative first
    calibration samples -> how far along the path the loss stays below epsilon

A path gives each exit a threshold of its own: the score from which its chance of a loss is at most the same for all of
them. Where too few samples are left to choose one, all exits have one threshold. Samples that choose certify nothing.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binom

from isthmus.models.recipes.common.learn_then_test import DELTA, accepted
from isthmus.models.recipes.vision.correctness import LEAST_LOSSES, choose_scores, exit_losses, fit_platt, scores_of
from isthmus.models.vision.exit_score import LEAST, log_odds, sigmoid
from isthmus.models.vision.manifest import NEVER, Among, CorrectnessHead, Promise, Threshold

EPSILONS = (0.005, 0.01, 0.015, 0.02, 0.03, 0.05)
GRID = tuple(round(1.0 - step / 200, 3) for step in range(100))  # scores 1.000, 0.995 ... 0.505, conservative first
RISKS = tuple(10 ** (-4 + step * 3.7 / 149) for step in range(150))  # chances of a loss, 0.0001 to 0.5
DESIGN_SHARE = 0.2  # of the calibration samples
LEAST_DESIGN = 500  # samples of that share; with fewer all exits have one threshold
STARTS = 4  # of the sequences that are tested among the inputs that leave, each with its part of delta

Bools = NDArray[np.bool_]
Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Integers = NDArray[np.int64]
Path = Sequence[tuple[float, ...]]  # thresholds of all exits, conservative first


@dataclass(frozen=True)
class Answers:
    """Probabilities of E exits for N samples, and the classes that are right and that the cloud model answers."""

    exits_ENK: Floats
    labels_N: Integers
    cloud_N: Integers

    def __len__(self) -> int:
        return len(self.labels_N)

    def some(self, chosen_N: NDArray[np.int64]) -> Answers:
        """The chosen samples."""
        return Answers(self.exits_ENK[:, chosen_N], self.labels_N[chosen_N], self.cloud_N[chosen_N])


@dataclass(frozen=True)
class Certified:
    """What each exit is judged by, None for its highest probability; and the certificates."""

    scores: tuple[CorrectnessHead | None, ...]
    thresholds: tuple[Threshold, ...]


def calibrate(answers: Answers, design: Answers | None = None) -> Certified:
    """Scores, path and certificates of one head.

    `design`: samples that neither trained the exits nor certify. Without them a share of the calibration samples is
    taken where there are enough: that depends on their number alone, or the certificates would not hold.
    """
    if design is None:
        design, answers = divided(answers)
    if design is None or exit_losses(design.exits_ENK, design.labels_N, design.cloud_N).sum(1).min() < LEAST_LOSSES:
        scores: tuple[CorrectnessHead | None, ...] = (None,) * len(answers.exits_ENK)
        return Certified(scores, certify(answers, scores, common_path(len(scores))))
    scores = choose_scores(design.exits_ENK, design.labels_N, design.cloud_N)
    return Certified(scores, certify(answers, scores, own_path(design, scores)))


def divided(answers: Answers) -> tuple[Answers | None, Answers]:
    """The samples that choose, None where there are too few, and those that certify."""
    count = int(len(answers) * DESIGN_SHARE)
    if count < LEAST_DESIGN:
        return None, answers
    order_N = np.random.default_rng(0).permutation(len(answers))
    return answers.some(order_N[:count]), answers.some(order_N[count:])


def common_path(exits: int) -> Path:
    """GRID, for all exits."""
    return [(confidence,) * exits for confidence in GRID]


def own_path(design: Answers, scores: Sequence[CorrectnessHead | None]) -> Path:
    """For each of RISKS the score of each exit from which the chance of a loss is at most that, by Platt's scaling."""
    scores_EN = scores_of(design.exits_ENK, scores)
    lost_EN = exit_losses(design.exits_ENK, design.labels_N, design.cloud_N)
    lines = [fit_platt(score_N, lost_N) for score_N, lost_N in zip(scores_EN, lost_EN, strict=True)]
    return [tuple(score_at(risk, *line) for line in lines) for risk in RISKS]


def score_at(risk: float, bias: float, slope: float) -> float:
    """Where bias + slope * log_odds(score) are the log-odds of `risk`; NEVER where a higher score is no safer."""
    if slope >= 0:
        return NEVER
    score = sigmoid((log_odds(risk) - bias) / slope)
    return math.ceil(1e6 * score) / 1e6 if score <= 1 - LEAST else NEVER


def first_exit(scores_EN: Doubles, confidences: Sequence[float]) -> Integers:
    """The index of the first exit whose score reaches its confidence, or the number of exits when none does."""
    leaves_EN = scores_EN >= np.array(confidences, scores_EN.dtype)[:, None]
    return np.where(leaves_EN.any(0), leaves_EN.argmax(0), len(scores_EN))


def epsilons_for(samples: int) -> tuple[float, ...]:
    """EPSILONS, and the smallest, in steps of 0.1 %, that this many samples without a loss certify, if it is larger.

    It depends on the number of samples alone: one chosen by the losses would void the certificate.
    """
    smallest = math.ceil(1000 * (1 - DELTA ** (1 / samples))) / 1000
    return tuple(sorted({*EPSILONS, max(smallest, EPSILONS[0])}))


def certify(
    answers: Answers,
    scores: Sequence[CorrectnessHead | None],
    path: Path,
    epsilons: Sequence[float] | None = None,
) -> tuple[Threshold, ...]:
    """For each promise, kind of average and epsilon the most permissive step of a path with P(loss > epsilon) <= DELTA.

    epsilons: by default `epsilons_for` the samples. Raises nothing: where no step is accepted, exits never answer.
    """
    steps = Steps(answers, scores_of(answers.exits_ENK, scores), path)
    kinds: tuple[tuple[Promise, Among], ...] = tuple(itertools.product(("accuracy", "agreement"), ("all", "exited")))
    return tuple(
        steps.threshold(promise, among, epsilon)
        for promise, among in kinds
        for epsilon in epsilons or epsilons_for(len(answers))
    )


class Steps:
    """What happens to samples at each step of a path of thresholds."""

    def __init__(self, answers: Answers, scores_EN: Doubles, path: Path) -> None:
        answers_EN = answers.exits_ENK.argmax(2)
        right_EN, same_EN = answers_EN == answers.labels_N, answers_EN == answers.cloud_N
        lost_EN = exit_losses(answers.exits_ENK, answers.labels_N, answers.cloud_N)
        self._path, self._samples, self._exits = path, len(answers), len(scores_EN)
        self._taken = [first_exit(scores_EN, confidences) for confidences in path]
        self._right = [self._count(taken_N, right_EN) for taken_N in self._taken]
        self._same = [self._count(taken_N, same_EN) for taken_N in self._taken]
        self._left = [int((taken_N < self._exits).sum()) for taken_N in self._taken]
        self._lost: dict[Promise, list[int]] = {
            "accuracy": [self._count(taken_N, lost_EN) for taken_N in self._taken],
            "agreement": [left - same for left, same in zip(self._left, self._same, strict=True)],
        }

    def _count(self, taken_N: Integers, which_EN: Bools) -> int:
        """For how many samples that leave at an exit `which` is true there."""
        kept_N = np.flatnonzero(taken_N < self._exits)
        return int(which_EN[taken_N[kept_N], kept_N].sum())

    def threshold(self, promise: Promise, among: Among, epsilon: float) -> Threshold:
        """The most permissive step that is certified, or one that never answers."""
        test = self._last_of_all if among == "all" else self._last_of_exited
        step, samples = test(self._lost[promise], epsilon), self._samples
        if step < 0 or not self._left[step]:
            never = (NEVER,) * self._exits, (0.0,) * self._exits
            confidences, shares, left, loss, right, same = *never, 0, 0.0, 0.0, 0.0
        else:
            left, confidences = self._left[step], self._path[step]
            shares = tuple(float((self._taken[step] == exit_).mean()) for exit_ in range(self._exits))
            loss = self._lost[promise][step] / (samples if among == "all" else left)
            right, same = self._right[step] / left, self._same[step] / left
        return Threshold(
            promise=promise,
            among=among,
            epsilon=epsilon,
            delta=DELTA,
            confidences=confidences,
            shares=shares,
            accuracy=right,
            agreement=same,
            loss=loss,
            samples=samples,
        )

    def _last_of_all(self, lost: Sequence[int], epsilon: float) -> int:
        """The last step accepted when the loss is averaged over all samples: one sequence from the first step on."""
        return accepted(binom.cdf(losses, self._samples, epsilon) for losses in lost) - 1

    def _last_of_exited(self, lost: Sequence[int], epsilon: float) -> int:
        """The last step accepted when the loss is averaged over the samples that leave.

        At the first steps too few leave to show anything, so sequences start at several steps, with Bonferroni's parts
        of DELTA. Given how many leave, their losses are binomial.
        """
        found = -1
        for start in range(0, len(self._path), math.ceil(len(self._path) / STARTS)):
            p_values = (
                binom.cdf(losses, left, epsilon) if left else 1.0
                for losses, left in zip(lost[start:], self._left[start:], strict=True)
            )
            if (count := accepted(p_values, DELTA / STARTS)) > 0:
                found = max(found, start + count - 1)
        return found
