"""Histograms -> a bank of frequency tables, and the table of each histogram."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from isthmus.models.codecs.context_model import (
    OUTSIDE,
)
from isthmus.models.codecs.tables import FREQUENCY_BITS

Floats = NDArray[np.float64]
Indexes = NDArray[np.intp]

MAX_INTEGER = 127  # integers are stored in 8 bits
ROUNDS = 20  # of k-means
MOST_MERGED = 4000  # histograms that are compared pair by pair


@dataclass(frozen=True)
class Cells:
    """Histograms of n contexts over integers minus the context's mode; column `zero` is the mode.

    A table must have the columns `low` to `high` of every histogram that it serves.
    """

    counts_nB: Floats
    low_n: Indexes
    high_n: Indexes
    zero: int


def build_bank(counts_nA: Floats, low_n: Indexes, high_n: Indexes, bank: int) -> tuple[list[Indexes], Indexes, Indexes]:
    """Tables; for each histogram its table, and the column of the table's first frequency.

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
    """Shift every histogram so that all modes are in one column."""
    symbols = counts_nA.shape[1]
    counts_nB = np.zeros((len(counts_nA), 2 * symbols))
    columns_nA = symbols - mode_n[:, None] + np.arange(symbols)
    np.put_along_axis(counts_nB, columns_nA, counts_nA, axis=1)
    return Cells(counts_nB, symbols - mode_n + low_n, symbols - mode_n + high_n, symbols)


def graded(counts_nB: Floats, bank: int) -> Indexes:
    """Labels 0 .. bank - 1 by bits an integer, in groups of equal size; for too many histograms to compare pairwise."""
    bits_n = code_length(counts_nB) / counts_nB.sum(1)
    rank_n = bits_n.argsort(kind="stable").argsort(kind="stable")
    found: Indexes = rank_n * bank // len(rank_n)
    return found


def merge(counts_nB: Floats, bank: int) -> Indexes:
    """Labels 0 .. bank - 1 by agglomerative clustering: merges the two groups whose union adds the fewest bits."""
    sums_nB = counts_nB[:, counts_nB.any(0)]  # most columns are empty, and cost as much as the others
    bits_n, label_n = code_length(sums_nB), np.arange(len(sums_nB))
    extra_nn = np.full((len(sums_nB), len(sums_nB)), np.inf)
    for row in range(len(sums_nB)):
        later = slice(row + 1, None)
        extra_nn[row, later] = code_length(sums_nB[row] + sums_nB[later]) - bits_n[later] - bits_n[row]
        extra_nn[later, row] = extra_nn[row, later]
    for _ in range(len(sums_nB) - bank):
        retained, gone = divmod(int(extra_nn.argmin()), len(sums_nB))
        sums_nB[retained] += sums_nB[gone]
        bits_n[retained] = code_length(sums_nB[retained])
        label_n[label_n == gone] = retained
        others_n = np.flatnonzero(np.isfinite(extra_nn[retained]))
        extra_nn[retained, others_n] = extra_nn[others_n, retained] = (
            code_length(sums_nB[retained] + sums_nB[others_n]) - bits_n[others_n] - bits_n[retained]
        )
        extra_nn[gone] = extra_nn[:, gone] = np.inf
    found: Indexes = np.unique(label_n, return_inverse=True)[1]
    return found


def settle(cells: Cells, label_n: Indexes) -> Indexes:
    """Reassign histograms to the cheapest table that covers their columns, until no assignment changes."""
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
    """Counts -> frequencies >= 1 that add up to 2**16; the largest absorbs the rounding error."""
    total = 1 << FREQUENCY_BITS
    found: Indexes = 1 + np.floor(counts_B / counts_B.sum() * (total - len(counts_B))).astype(np.intp)
    found[found.argmax()] += total - found.sum()
    return found


def code_length(counts_B: Floats) -> Floats:
    """Bits of histograms (..., B), each coded with its own optimal table: counts times entropy."""
    total = counts_B.sum(-1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        bits = np.where(counts_B > 0, counts_B * np.log2(total / counts_B), 0.0)
    found: Floats = bits.sum(-1)
    return found
