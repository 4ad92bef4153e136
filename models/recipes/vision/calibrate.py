"""Certified thresholds of exits, by learn-then-test."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binom

from isthmus.models.recipes.common.learn_then_test import DELTA, accepted
from isthmus.models.vision.manifest import Threshold

EPSILONS = (0.005, 0.01, 0.015, 0.02, 0.03, 0.05)
GRID = tuple(
    round(1.0 - step / 200, 3) for step in range(100)
)  # confidences 1.000, 0.995 ... 0.505, conservative first
NEVER = 2.0  # a confidence that no exit reaches

Bools = NDArray[np.bool_]
Floats = NDArray[np.float32]


def first_exit(confidence_EN: Floats, threshold: float) -> NDArray[np.int64]:
    """The index of the first exit whose confidence reaches `threshold`, or the number of exits when none does."""
    confident_EN = confidence_EN >= threshold
    return np.where(confident_EN.any(0), confident_EN.argmax(0), len(confidence_EN))


def epsilons_for(samples: int) -> tuple[float, ...]:
    """EPSILONS, and the smallest, in steps of 0.1 %, that this many samples without a loss certify, if it is larger.

    It depends on the number of samples alone: one chosen by the losses would void the certificate.
    """
    smallest = math.ceil(1000 * (1 - DELTA ** (1 / samples))) / 1000
    return tuple(sorted({*EPSILONS, max(smallest, EPSILONS[0])}))


def certify(
    confidence_EN: Floats, exit_right_EN: Bools, cloud_right_N: Bools, epsilons: Sequence[float] | None = None
) -> tuple[Threshold, ...]:
    """For each epsilon the most permissive threshold with P(loss of accuracy > epsilon) <= DELTA.

    epsilons: by default `epsilons_for` the samples.

    Loss of one input: 1 when the exit it takes is wrong and the cloud model right, else 0. Learn-then-test
    (Angelopoulos et al., 2021): exact binomial p-values along GRID in fixed order, the last threshold accepted before
    the first refusal.
    """
    samples = len(cloud_right_N)
    losses, coverages = [], []
    for threshold in GRID:
        taken_N = first_exit(confidence_EN, threshold)
        exited_N = taken_N < len(confidence_EN)
        right_N = np.take_along_axis(exit_right_EN, np.minimum(taken_N, len(confidence_EN) - 1)[None], 0)[0]
        losses.append(int((exited_N & ~right_N & cloud_right_N).sum()))
        coverages.append(float(exited_N.mean()))
    certified = []
    for epsilon in epsilons or epsilons_for(samples):
        last = accepted(binom.cdf(loss, samples, epsilon) for loss in losses) - 1
        certified.append(
            Threshold(
                epsilon=epsilon,
                delta=DELTA,
                confidence=GRID[last] if last >= 0 else NEVER,
                coverage=coverages[last] if last >= 0 else 0.0,
                loss=losses[last] / samples if last >= 0 else 0.0,
                samples=samples,
            )
        )
    return tuple(certified)
