"""New thresholds of the exits from audited pairs, without labels: learn-then-test on agreement with the cloud model.

As the recipes do on a calibration part (Angelopoulos et al., 2021): exact binomial p-values along a fixed sequence of
thresholds, the same for every exit, strictest first; the last one before the first refusal. Needs no SciPy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from isthmus.edge_agent.policy.audit import DELTA, Level, Pair

GRID = tuple(round(1 - step / 200, 3) for step in range(101))  # 1.000, 0.995 ... 0.500
STRICTER = (1.0, 0.5, 0.25)  # parts of epsilon that are certified: the first in force, the others for later alarms
BISECTIONS = 40


@dataclass(frozen=True, slots=True)
class Certificate:
    """A level of which it is certified: P(disagreement among all inputs > epsilon) <= delta, from `pairs` inputs."""

    epsilon: float
    delta: float
    level: Level
    coverage: float  # share of the pairs that exits answer
    disagreement: float  # observed
    pairs: int


def certify(pairs: Sequence[Pair], epsilon: float, delta: float = DELTA) -> Certificate | None:
    """The most permissive level that is certified; None if there is none."""
    count, found = len(pairs), None
    if not count:
        return None
    scores_NE = np.array([pair.scores for pair in pairs])
    differ_NE = np.array([pair.answers for pair in pairs]) != np.array([[pair.cloud] for pair in pairs])
    for confidence in GRID:
        reached_NE = scores_NE >= confidence
        exits_N, first_N = reached_NE.any(1), reached_NE.argmax(1)
        differing = int((exits_N & differ_NE[np.arange(count), first_N]).sum())
        if binomial_cdf(differing, count, epsilon) > delta:
            break
        level = Level((confidence,) * scores_NE.shape[1])
        found = Certificate(epsilon, delta, level, float(exits_N.mean()), differing / count, count)
    return found if found and found.coverage else None


def recalibrated(pairs: Sequence[Pair], epsilon: float, delta: float = DELTA) -> list[Certificate]:
    """Certificates of STRICTER parts of epsilon, strictest last; empty if none answers anything."""
    found = [certify(pairs, part * epsilon, delta) for part in STRICTER]
    return [each for each in found if each is not None]


def binomial_cdf(most: int, trials: int, rate: float) -> float:
    """P(at most `most` of `trials` happen), each with probability `rate`."""
    if most >= trials or rate <= 0:
        return 1.0
    if rate >= 1:
        return 0.0
    log_rate, log_rest = math.log(rate), math.log1p(-rate)
    return min(
        1.0,
        math.fsum(
            math.exp(
                math.lgamma(trials + 1)
                - math.lgamma(count + 1)
                - math.lgamma(trials - count + 1)
                + count * log_rate
                + (trials - count) * log_rest
            )
            for count in range(most + 1)
        ),
    )


def upper_bound(happened: int, trials: int, delta: float = DELTA) -> float:
    """The rate that is exceeded with at most probability `delta` (Clopper & Pearson, one-sided)."""
    low, high = happened / trials, 1.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if binomial_cdf(happened, trials, middle) <= delta else (middle, high)
    return high
