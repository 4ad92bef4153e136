"""Learn-then-test: thresholds with a promise, from losses on samples that nothing was chosen by.

    thresholds, conservative first -> p-value of "the mean loss is above epsilon" -> accepted until the first refusal

With probability 1 - delta over the samples, the mean loss at every accepted threshold is at most epsilon: hypotheses in
an order fixed beforehand need no correction for their number.

Sources: learn-then-test with fixed-sequence testing (Angelopoulos et al., 2021); p-values of losses in [0, 1] by
betting (Waudby-Smith & Ramdas, 2023; as in Bates et al., 2021, section 3.1.3). These need fewer samples than
Hoeffding-Bentkus where most losses are small. Exact binomial p-values serve losses of 0 or 1.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

DELTA = 0.1  # a certificate fails with at most this probability
BISECTIONS = 40
GROWTH = 1.05  # of the number of samples that is tried
MOST_SAMPLES = 1_000_000

Floats = NDArray[np.float64]


def accepted(p_values: Iterable[float], delta: float = DELTA) -> int:
    """How many thresholds of a fixed sequence are accepted: those before the first whose p-value is above delta."""
    count = 0
    for p_value in p_values:
        if not p_value <= delta:
            break
        count += 1
    return count


def betting_p(losses_N: Floats, epsilon: float, delta: float = DELTA) -> float:
    """The p-value of "the mean loss is above epsilon", from losses in [0, 1] in random order.

    A bettor gains where losses are below epsilon; their capital rarely grows if the mean is above it (Ville). Each
    stake depends on the losses before it, and on `delta`, for which it is best.
    """
    stakes_N = stakes(losses_N, delta)
    with np.errstate(divide="ignore"):  # all is lost
        log_capital_N = np.cumsum(np.log1p(stakes_N * (epsilon - losses_N)))
    return float(np.exp(-max(log_capital_N.max(), 0.0)))


def stakes(losses_N: Floats, delta: float) -> Floats:
    """The part of their capital that a bettor stakes on each loss, at most 1."""
    counts_N = np.arange(1, len(losses_N) + 1)
    means_N = (0.5 + np.cumsum(losses_N)) / (1 + counts_N)
    variances_N = (0.25 + np.cumsum((losses_N - means_N) ** 2)) / (1 + counts_N)
    before_N = np.append(0.25, variances_N[:-1])
    stakes_N: Floats = np.minimum(np.sqrt(2 * math.log(1 / delta) / (len(losses_N) * before_N)), 1.0)
    return stakes_N


def upper_bound(losses_N: Floats, delta: float = DELTA) -> float:
    """The smallest epsilon that the losses certify: the mean loss is at most that, with confidence 1 - delta."""
    low, high = 0.0, 1.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if betting_p(losses_N, middle, delta) <= delta else (middle, high)
    return high


def certify(losses_LN: Sequence[Floats], delta: float = DELTA) -> list[float]:
    """For each of L thresholds, conservative first, the smallest epsilon at which it is accepted.

    Whatever epsilon is chosen beforehand, the last threshold with at most that is the one that learn-then-test returns.
    """
    return list(itertools.accumulate((upper_bound(losses_N, delta) for losses_N in losses_LN), max))


def samples_needed(losses_N: Floats, epsilon: float, delta: float = DELTA) -> int | None:
    """About how many samples with losses as these certify epsilon; None where no number does."""
    count = len(losses_N)
    if losses_N.mean() >= epsilon:
        return None
    while betting_p(np.resize(losses_N, count), epsilon, delta) > delta:
        count = math.ceil(count * GROWTH)
        if count > MOST_SAMPLES:
            return None
    return count
