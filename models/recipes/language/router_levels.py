"""Levels of a router: from which confidence the device decides, what that asks of the cloud, and what is promised.

training prompts  --> thresholds, at given offload rates
test prompts      --> offload rate, loss of each prompt --learn-then-test over prompts--> certificates
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from isthmus.models.bundle.manifest import Interval
from isthmus.models.language.router.manifest import Certificate, OffloadLevel, level_for
from isthmus.models.recipes.common.learn_then_test import DELTA, certify, samples_needed

# Offload rates of the levels, in percent: more of them cost no certainty, as they are tested in one fixed order
PERCENT = (0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5, *range(4, 16), *range(16, 30, 2), *range(30, 98, 3), 98)
RATES = tuple(each / 100 for each in PERCENT)
QUALITIES = (0.9, 0.95, 0.97, 0.98, 0.99, 0.995, 0.999)  # of the dial, that a report is about
RESAMPLES = 1000

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Choices:
    """The device's choices for N tokens of P answers: confidence, whether right, and the answer that each belongs to.

    Answers are in random order.
    """

    confidence_N: Floats
    right_N: NDArray[np.bool_]
    prompt_N: NDArray[np.int64]

    def losses(self, likely: float) -> Floats:
        """For each answer (P,) the share of its tokens that the device decides, from a threshold on, and has wrong."""
        wrong_N = (self.confidence_N >= likely) & ~self.right_N
        return self._shares(wrong_N)

    def asked(self, likely: float) -> float:
        """The share of tokens below a threshold."""
        return float((self.confidence_N < likely).mean())

    def _shares(self, chosen_N: NDArray[np.bool_]) -> Floats:
        counts_P = np.bincount(self.prompt_N)
        shares_P: Floats = np.bincount(self.prompt_N, chosen_N, len(counts_P)) / counts_P
        return shares_P


def thresholds(confidence_N: Floats, rates: Sequence[float] = RATES) -> list[float]:
    """Rising thresholds, from 0, that offload `rates` of what is trained on."""
    quantiles = {float(np.quantile(confidence_N, rate)) for rate in rates if rate}
    return [0.0, *sorted(quantiles - {0.0})]


def token_levels(likely: Sequence[float], test: Choices, seed: int) -> list[OffloadLevel]:
    """A level for each of some thresholds, which nothing of the test prompts has chosen."""
    return certified_levels(likely, [test.asked(each) for each in likely], [test.losses(each) for each in likely], seed)


def certified_levels(
    likely: Sequence[float], asked: Sequence[float], losses_LP: Sequence[Floats], seed: int
) -> list[OffloadLevel]:
    """Levels of rising thresholds with their offload rates and the losses of test prompts (P,), in random order."""
    certified = certify(losses_LP[::-1])[::-1]
    return [
        OffloadLevel(
            likely=threshold,
            asked=rate,
            wrong=mean_interval(losses_P, seed),
            certificate=Certificate(epsilon=epsilon, delta=DELTA, prompts=len(losses_P)),
        )
        for threshold, rate, losses_P, epsilon in zip(likely, asked, losses_LP, certified, strict=True)
    ]


def mean_interval(values_P: Floats, seed: int) -> Interval:
    """The mean over prompts, with a 95 % interval from resampling them."""
    count, mean = len(values_P), float(values_P.mean())
    means = values_P[np.random.default_rng(seed).integers(0, count, (RESAMPLES, count))].mean(1)
    low, high = (float(np.quantile(means, edge)) for edge in (0.025, 0.975))
    return Interval(value=mean, low=min(low, mean), high=max(high, mean), samples=count)


def report(levels: Sequence[OffloadLevel], test: Choices) -> list[str]:
    """For each quality of the dial, one line: the level that keeps it, or how many prompts would certify it."""
    lines = []
    for quality in QUALITIES:
        level = level_for(levels, quality)
        if level is None:
            lines.append(f"quality {quality:g}: not certified, {needed(levels, test, quality)}")
            continue
        wrong = level.wrong
        lines.append(
            f"quality {quality:g}: asks {level.asked:.1%}, wrong {wrong.value:.2%} [{wrong.low:.2%}, {wrong.high:.2%}],"
            f" certified at most {level.certificate.epsilon:.2%}"
        )
    return lines


def needed(levels: Sequence[OffloadLevel], test: Choices, quality: float) -> str:
    """How many test prompts would certify a quality, about, and at which offload rate: the fewest of any level."""
    counts = [(samples_needed(test.losses(level.likely), 1 - quality), level.asked) for level in levels]
    found = min(((count, asked) for count, asked in counts if count is not None), default=None)
    had = levels[0].certificate.prompts
    if found is None:
        return f"the device is wrong too often at every level ({had} test prompts)"
    return f"about {found[0]} test prompts would be needed, there are {had} (asking {found[1]:.0%})"
