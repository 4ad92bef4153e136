"""Integers of many inputs -> the contextual codec's tables. Knows nothing about networks; deterministic.

    integers --> ranges --> weights of the contexts --> histogram of every context --> bank of tables, priors

Contexts are guesses of the integer by least squares. Histograms, each moved so that its mode is at zero, are merged two
by two where that costs the fewest bits, then moved between tables until none saves any (k-means in code length).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from isthmus.models.codecs.context_model import (
    ALL_CONTEXTS,
    CONTEXTS,
    ENDS,
    OUTSIDE,
    PHASES,
    STEP_BITS,
    Checkerboard,
    ContextLookup,
    ContextWeights,
    Flat,
    Integers,
)
from isthmus.models.codecs.tables import FREQUENCY_BITS, Tables
from isthmus.models.recipes.common.ridge import ridge

BANK = 24  # tables
MAX_INTEGER = 127  # integers are stored in 8 bits
MARGIN = 1  # integers that a channel may take beyond those seen
OUTLIERS = 0.002  # share of guesses below the first context, and above the last
GUESSED = 512  # inputs that weights are fitted to; each has thousands of positions
CHUNK = 128  # inputs whose contexts are worked out at once
MAX_END, MAX_WEIGHT = 127, (1 << 15) - 1  # as stored: weights of the image's ends, others
RATIOS = ((1, 1), (1, 0), (0, 1), (2, 1), (1, 2), (3, 1), (1, 3), (3, 2), (2, 3))
RIDGE = 1e-5  # keeps the weights of neighbours that are always zero finite
FLAT = 1e-6  # guesses that differ by less are one guess
PSEUDO = 1.0  # integers that a context takes over from its channel, so that none is empty
ROUNDS = 20  # of k-means
MOST_MERGED = 4000  # histograms that are compared pair by pair

Floats = NDArray[np.float64]
Indexes = NDArray[np.intp]


@dataclass(frozen=True)
class Cells:
    """Histograms of n contexts over integers less the context's mode: column `zero` is the mode.

    A table must have the columns `low` to `high` of every histogram that it serves.
    """

    counts_nB: Floats
    low_n: Indexes
    high_n: Indexes
    zero: int


def fit(integers: Sequence[Integers], gain_RC: NDArray[np.float32], bank: int = BANK) -> Tables:
    """At most `bank` tables for integers (N, C, H, W), one array a rate, that were quantised with `gain_RC`.

    Integers beyond 8 bits count as clipped. A channel that always took one integer at a rate becomes silent.
    Raises ValueError when all did.
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
    """The lowest and the highest integer that each channel may take."""
    low_C, high_C = integers_NCHW.min((0, 2, 3)).astype(np.intp), integers_NCHW.max((0, 2, 3)).astype(np.intp)
    margin_C = np.where(low_C < high_C, MARGIN, 0)
    return np.maximum(low_C - margin_C, -MAX_INTEGER), np.minimum(high_C + margin_C, MAX_INTEGER)


def guess(board: Checkerboard, flat_NL: Flat, low_C: Indexes, high_C: Indexes) -> ContextWeights:
    """Weights that guess each integer by least squares, in units that spread over a phase's contexts."""
    channels = len(low_C)
    near_C2, slope_C = np.ones((channels, 2), np.uint8), np.zeros(channels, np.int16)
    bias_C2, ends_C24 = np.zeros((channels, PHASES), np.int16), np.zeros((channels, PHASES, ENDS), np.int8)
    for phase, channel, target_M, sums_M2, ends_M4 in samples(board, flat_NL):
        near_C2[channel] = ratio(sums_M2, target_M)
        features_M6 = np.column_stack([sums_M2 @ near_C2[channel], ends_M4, np.ones_like(target_M)])
        weights_6 = units(features_M6, target_M, CONTEXTS[phase].stop - CONTEXTS[phase].start)
        slope_C[channel], ends_C24[channel, phase], bias_C2[channel, phase] = weights_6[0], weights_6[1:5], weights_6[5]
    return ContextWeights(low_C.astype(np.int8), high_C.astype(np.int8), near_C2, slope_C, bias_C2, ends_C24)


def samples(board: Checkerboard, flat_NL: Flat) -> Iterator[tuple[int, int, Floats, Floats, Floats]]:
    """For each phase and channel, over M places of all inputs: integer, sums across and down, which ends it is at."""
    known = board.neighbours(flat_NL)
    channel_P = board.channels()
    for phase, sums in enumerate(((np.zeros_like(known[0]), np.zeros_like(known[1])), known)):
        inside_P = board.phase(board.inside, phase) > 0
        ends_P4 = board.phase(board.ends(), phase)[:, None] >> np.arange(ENDS) & 1
        for channel in np.unique(channel_P[inside_P]).tolist():
            here = np.flatnonzero(inside_P & (channel_P == channel))
            target_M, across_M, down_M = (
                array[:, here].ravel().astype(np.float64) for array in (board.phase(flat_NL, phase), *sums)
            )
            ends_M4 = np.tile(ends_P4[here].astype(np.float64), (len(flat_NL), 1))
            yield phase, channel, target_M, np.stack([across_M, down_M], 1), ends_M4


def ratio(sums_M2: Floats, target_M: Floats) -> tuple[int, int]:
    """How often sums across and down should count, of RATIOS, to explain the most of the target."""
    centred_M2 = sums_M2 - sums_M2.mean(0)
    squares_22, products_2 = centred_M2.T @ centred_M2, centred_M2.T @ (target_M - target_M.mean())
    near_R2 = np.array(RATIOS)
    power_R = np.einsum("ri,ij,rj->r", near_R2, squares_22, near_R2)
    explained_R = (near_R2 @ products_2) ** 2 / np.maximum(power_R, FLAT)
    return RATIOS[int(explained_R.argmax())]


def units(features_M6: Floats, target_M: Floats, contexts: int) -> Floats:
    """Least squares, moved and scaled so that guesses spread over the contexts; whole numbers.

    Features are a weighted sum, four ends, and 1.
    """
    weights_6 = ridge(features_M6.T @ features_M6, features_M6.T @ target_M, RIDGE * len(features_M6))
    low, high = np.quantile(features_M6 @ weights_6, (OUTLIERS, 1 - OUTLIERS))
    if high - low < FLAT:
        return np.zeros(6)
    weights_6[-1] -= low
    weights_6 *= (contexts << STEP_BITS) / (high - low)
    too_large = max(np.abs(weights_6[1:5]).max() / MAX_END, np.abs(weights_6).max() / MAX_WEIGHT)
    whole_6: Floats = np.rint(weights_6 / max(1.0, too_large))
    return whole_6


def count(
    board: Checkerboard, integers_NCHW: NDArray[np.int8], weights: ContextWeights, first: int, last: int
) -> Floats:
    """Histograms (C * ALL_CONTEXTS, A) over first .. last, as shares of the rate's bits without contexts.

    So a cheap rate counts as much as a costly one. Every context takes over a little of its channel's histogram.
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


def build_bank(counts_nA: Floats, low_n: Indexes, high_n: Indexes, bank: int) -> tuple[list[Indexes], Indexes, Indexes]:
    """Tables; for each histogram its table, and the column that the table's first frequency is for.

    Modes are rounded to multiples of 1, 2, 4, … until the pairs of table and first column are few enough.
    """
    counts_nB = aligned(counts_nA, counts_nA.argmax(1), low_n, high_n).counts_nB
    table_n = merge(counts_nB, bank) if len(counts_nB) <= MOST_MERGED else graded(counts_nB, bank)
    for shift in range(MAX_INTEGER.bit_length() + 2):
        mode_n = counts_nA.argmax(1) >> shift << shift
        cells = aligned(counts_nA, mode_n, low_n, high_n)
        table_n = settle(cells, table_n)
        tables, starts = tables_of(cells, table_n)
        first_n = starts[table_n] - cells.zero + mode_n
        if len(set(zip(table_n.tolist(), first_n.tolist(), strict=True))) <= OUTSIDE:
            break
    order = np.argsort([code_length(np.array(table, np.float64)) for table in tables], kind="stable")
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    return [tables[index] for index in order], rank[table_n], first_n


def aligned(counts_nA: Floats, mode_n: Indexes, low_n: Indexes, high_n: Indexes) -> Cells:
    """Move every histogram so that its mode is in one column."""
    symbols = counts_nA.shape[1]
    counts_nB = np.zeros((len(counts_nA), 2 * symbols))
    columns_nA = symbols - mode_n[:, None] + np.arange(symbols)
    np.put_along_axis(counts_nB, columns_nA, counts_nA, axis=1)
    return Cells(counts_nB, symbols - mode_n + low_n, symbols - mode_n + high_n, symbols)


def graded(counts_nB: Floats, bank: int) -> Indexes:
    """Labels 0 .. bank - 1 by bits an integer: groups of one size, where there are too many histograms to compare."""
    bits_n = code_length(counts_nB) / counts_nB.sum(1)
    rank_n = bits_n.argsort(kind="stable").argsort(kind="stable")
    found: Indexes = rank_n * bank // len(rank_n)
    return found


def merge(counts_nB: Floats, bank: int) -> Indexes:
    """Labels 0 .. bank - 1: the two groups whose union costs the fewest bits more become one, again and again."""
    sums_nB, bits_n, label_n = counts_nB.copy(), code_length(counts_nB), np.arange(len(counts_nB))
    extra_nn = np.stack([code_length(row_B + sums_nB) - bits_n for row_B in sums_nB]) - bits_n[:, None]
    np.fill_diagonal(extra_nn, np.inf)
    for _ in range(len(sums_nB) - bank):
        kept, gone = divmod(int(extra_nn.argmin()), len(sums_nB))
        sums_nB[kept] += sums_nB[gone]
        bits_n[kept] = code_length(sums_nB[kept])
        label_n[label_n == gone] = kept
        dead = np.isinf(extra_nn[kept])
        extra_nn[kept] = extra_nn[:, kept] = np.where(
            dead, np.inf, code_length(sums_nB[kept] + sums_nB) - bits_n - bits_n[kept]
        )
        extra_nn[gone] = extra_nn[:, gone] = np.inf
    found: Indexes = np.unique(label_n, return_inverse=True)[1]
    return found


def settle(cells: Cells, label_n: Indexes) -> Indexes:
    """Move histograms to cheaper tables that have the columns they need, until none moves."""
    for _ in range(ROUNDS):
        tables, starts = tables_of(cells, label_n)
        bits_nT = np.full((len(label_n), len(tables)), np.inf)
        for index, (table, start) in enumerate(zip(tables, starts, strict=True)):
            bits_n = cells.counts_nB[:, start : start + len(table)] @ (FREQUENCY_BITS - np.log2(table))
            covered_n = (cells.low_n >= start) & (cells.high_n < start + len(table))
            bits_nT[:, index] = np.where(covered_n, bits_n, np.inf)
        moved_n: Indexes = np.unique(bits_nT.argmin(1), return_inverse=True)[1]
        if np.array_equal(moved_n, label_n):
            break
        label_n = moved_n
    return label_n


def tables_of(cells: Cells, label_n: Indexes) -> tuple[list[Indexes], Indexes]:
    """For each label a table of frequencies, and the column it starts at."""
    tables, starts = [], []
    for label in range(label_n.max() + 1):
        members = label_n == label
        start, stop = cells.low_n[members].min(), cells.high_n[members].max() + 1
        tables.append(frequencies(cells.counts_nB[members, start:stop].sum(0)))
        starts.append(start)
    return tables, np.array(starts)


def frequencies(counts_B: Floats) -> Indexes:
    """Counts -> frequencies >= 1 that add up to 2**16; the most frequent takes what rounding leaves."""
    total = 1 << FREQUENCY_BITS
    found: Indexes = 1 + np.floor(counts_B / counts_B.sum() * (total - len(counts_B))).astype(np.intp)
    found[found.argmax()] += total - found.sum()
    return found


def code_length(counts_B: Floats) -> Floats:
    """Bits of histograms (..., B) under tables made for each alone."""
    total = counts_B.sum(-1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        bits = np.where(counts_B > 0, counts_B * np.log2(total / counts_B), 0.0)
    found: Floats = bits.sum(-1)
    return found
