"""Integers of many inputs -> the contextual codec's tables. Knows nothing about networks; deterministic.

    integers --> ranges --> weights of the contexts --> histogram of every context --> bank of tables, priors

Contexts are guesses of the integer by least squares. Histograms, each aligned so that its mode is at zero, are merged
pairwise where that costs the fewest bits, then reassigned to tables until no move saves bits (k-means in code length).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from isthmus.models.codecs.context_model import (
    ALL_CONTEXTS,
    OUTSIDE,
    PHASES,
    Checkerboard,
    ContextLookup,
    ContextWeights,
    Integers,
)
from isthmus.models.codecs.tables import Tables
from isthmus.models.recipes.common.fit_bank import MAX_INTEGER, Floats, Indexes, build_bank, code_length
from isthmus.models.recipes.common.fit_contexts import guess

BANK = 24  # tables
MARGIN = 1  # added to the observed range of a channel
GUESSED = 512  # inputs to which weights are fitted; each has thousands of positions
CHUNK = 128  # inputs whose contexts are computed at once
PSEUDO = 1.0  # pseudo-counts of a context, distributed as its channel's integers, so that none is empty


def fit(integers: Sequence[Integers], gain_RC: NDArray[np.float32], bank: int = BANK) -> Tables:
    """At most `bank` tables for integers (N, C, H, W), one array a rate, that were quantised with `gain_RC`.

    Integers beyond 8 bits are clipped. A channel with a single value at a rate becomes silent.
    Raises ValueError when all channels are silent.
    """
    clipped = [np.clip(of_rate, -MAX_INTEGER, MAX_INTEGER).astype(np.int8) for of_rate in integers]
    low_RC, high_RC = (np.array(ends) for ends in zip(*map(ranges, clipped), strict=True))
    live_RC = low_RC < high_RC
    if not live_RC.any():
        raise ValueError("every channel is silent at every rate: there is nothing to fit")
    first, last = int(low_RC.min()), int(high_RC.max())
    weights, histograms = [], []
    for of_rate, low_C, high_C, live_C in zip(clipped, low_RC, high_RC, live_RC, strict=True):
        _, channels, height, width = of_rate.shape
        board = Checkerboard((channels, height, width), np.flatnonzero(live_C).tolist())
        flat_NL = board.scatter(of_rate[:: -(-len(of_rate) // GUESSED)])
        weights.append(guess(board, flat_NL, low_C[live_C], high_C[live_C]))
        histograms.append(count(board, of_rate, weights[-1], first, last))
    low_n, high_n = (np.repeat(ends_RC[live_RC] - first, ALL_CONTEXTS) for ends_RC in (low_RC, high_RC))
    tables, table_n, first_n = build_bank(np.concatenate(histograms), low_n, high_n, bank)
    priors_E2, prior_n = np.unique(np.stack([table_n, first_n + first], 1), axis=0, return_inverse=True)
    return Tables(
        gain_RC=gain_RC.astype(np.float32),
        low_RC=low_RC.astype(np.int8),
        high_RC=high_RC.astype(np.int8),
        near_L2=np.concatenate([of_rate.near_C2 for of_rate in weights]),
        slope_L=np.concatenate([of_rate.slope_C for of_rate in weights]),
        bias_L2=np.concatenate([of_rate.bias_C2 for of_rate in weights]),
        ends_L24=np.concatenate([of_rate.ends_C24 for of_rate in weights]),
        prior_LK=prior_n.reshape(-1, ALL_CONTEXTS).astype(np.uint8),
        table_E=priors_E2[:, 0].astype(np.uint8),
        first_E=priors_E2[:, 1].astype(np.int16),
        lengths_T=np.array([len(table) for table in tables], np.uint16),
        frequencies=np.concatenate(tables).astype(np.uint16),
    )


def ranges(integers_NCHW: NDArray[np.int8]) -> tuple[Indexes, Indexes]:
    """The range of each channel: lowest and highest integer, each with a margin."""
    low_C, high_C = integers_NCHW.min((0, 2, 3)).astype(np.intp), integers_NCHW.max((0, 2, 3)).astype(np.intp)
    margin_C = np.where(low_C < high_C, MARGIN, 0)
    return np.maximum(low_C - margin_C, -MAX_INTEGER), np.minimum(high_C + margin_C, MAX_INTEGER)


def count(
    board: Checkerboard, integers_NCHW: NDArray[np.int8], weights: ContextWeights, first: int, last: int
) -> Floats:
    """Histograms (C * ALL_CONTEXTS, A) over first .. last, as shares of the rate's bits without contexts.

    All rates thus have equal weight. Every context gets pseudo-counts from its channel's histogram.
    """
    channels, symbols = len(weights.low_C), last - first + 1
    contexts = ContextLookup(board, weights, np.tile(np.arange(ALL_CONTEXTS, dtype=np.uint8), (channels, 1)))
    cell_P = board.channels() * ALL_CONTEXTS
    counts = np.zeros(channels * ALL_CONTEXTS * symbols, np.int64)
    for start, phase in itertools.product(range(0, len(integers_NCHW), CHUNK), range(PHASES)):
        flat_NL = board.scatter(integers_NCHW[start : start + CHUNK])
        integers_NP = board.phase(flat_NL, phase)
        context_NP = np.broadcast_to(contexts.priors(flat_NL, phase), integers_NP.shape)
        index_NP = (cell_P + context_NP) * symbols + integers_NP - first
        counts += np.bincount(index_NP[context_NP != OUTSIDE], minlength=len(counts))
    counts_CKA = counts.reshape(channels, ALL_CONTEXTS, symbols)
    counts_C1A = counts_CKA.sum(1, keepdims=True)
    smoothed_CKA = counts_CKA + PSEUDO * counts_C1A / counts_C1A.sum(2, keepdims=True)
    shares: Floats = (smoothed_CKA / max(1.0, code_length(counts_C1A).sum())).reshape(-1, symbols)
    return shares
