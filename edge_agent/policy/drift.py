"""Whether inputs still look like those before: bets on ranks. Pure; needs no label, no cloud and no calibration part.

    statistics of each input -> bin of each -> rank among all inputs so far -> bets on high and on low ranks

Where inputs are exchangeable, the rank of the newest among all of them is uniform, whatever the network and the place
(Vovk, "Testing Randomness Online", Statistical Science 2021). After a shift, ranks of some statistic are mostly high or
mostly low, and who bets on that wins. The capital is spread over all statistics and bets, and brought in over time, as
in `policy.audit`. It tells that inputs changed, not that answers got worse. Neighbouring frames of a video are not
exchangeable: a scene that lasts is a shift to it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]

MOST_CAPITAL = 1000.0  # at which the alarm goes: one false alarm in a thousand streams of HORIZON inputs
HORIZON = 20_000
AT_START = 0.5  # of the capital; the rest is brought in over HORIZON inputs
FIRST = 200  # inputs that set the bins, and take no part in the bets
BINS = 32
STAKES = np.array([0.3, 0.6, 0.9, -0.3, -0.6, -0.9])  # on high ranks, and on low ones
MOST_STATISTICS = 64
RICHEST = 1e12  # capital that is told apart


class DriftGate:
    """The bets of one stream, or of several at once: statistics (..., K) have any leading axes."""

    def __init__(self, seed: int = 0) -> None:
        """`seed` breaks ties between ranks."""
        self._random = np.random.default_rng(seed)
        self._first: list[Floats] = []
        self._edges_KE: Floats = np.empty(0)
        self._counts_KB = self._capitals_KS = np.empty(0)
        self._inputs = 0

    @property
    def capital(self) -> Floats:
        """Of all bets, (...): without a shift, at most 1 on average after HORIZON inputs."""
        return self._capitals_KS.mean((-2, -1)) if self._inputs else np.zeros(())

    @property
    def alarm(self) -> NDArray[np.bool_]:
        """Whether inputs look unlike those before, (...)."""
        return np.asarray(self.capital >= MOST_CAPITAL)

    def observe(self, statistics_K: Floats) -> None:
        """One more input of each stream."""
        if len(self._first) < FIRST:
            self._first.append(statistics_K)
            if len(self._first) == FIRST:
                self._begin(statistics_K.shape)
            return
        bin_K1 = (statistics_K[..., None] >= self._edges_KE).sum(-1, keepdims=True)
        same_K1 = np.take_along_axis(self._counts_KB, bin_K1, -1) + 1
        np.put_along_axis(self._counts_KB, bin_K1, same_K1, -1)
        self._inputs += 1
        up_to_K1 = np.take_along_axis(self._counts_KB.cumsum(-1), bin_K1, -1)
        rank_K1 = (up_to_K1 - same_K1 * self._random.random(same_K1.shape)) / self._inputs
        fresh = (1 - AT_START) / HORIZON
        self._capitals_KS = np.minimum((self._capitals_KS + fresh) * (1 + STAKES * (2 * rank_K1 - 1)), RICHEST)

    def _begin(self, shape: tuple[int, ...]) -> None:
        self._edges_KE = np.moveaxis(np.quantile(np.stack(self._first), np.arange(1, BINS) / BINS, axis=0), 0, -1)
        self._counts_KB = np.zeros((*shape, BINS), np.int64)
        self._capitals_KS = np.full((*shape, len(STAKES)), AT_START)


def statistics(features: Floats, score: float) -> Floats:
    """Of one input, (K,): means of channels of the first segment's features, and the score of the first exit.

    features: (C, H, W), or tokens (N, C). Of more channels than MOST_STATISTICS - 1 every second or third is taken.
    """
    means_C = features.mean(0) if features.ndim == 2 else features.reshape(len(features), -1).mean(1)
    step = -(-len(means_C) // (MOST_STATISTICS - 1))
    return np.append(means_C[::step], score)
