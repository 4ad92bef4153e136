"""Integers -> the weights of their contexts, by least squares."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from isthmus.models.codecs.context_model import (
    CONTEXTS,
    ENDS,
    PHASES,
    STEP_BITS,
    Checkerboard,
    ContextWeights,
    Flat,
)
from isthmus.models.recipes.common.fit_bank import Floats, Indexes
from isthmus.models.recipes.common.ridge import ridge

OUTLIERS = 0.002  # share of guesses below the first context, and above the last
MAX_END, MAX_WEIGHT = 127, (1 << 15) - 1  # as stored: weights of the image's ends, others
RATIOS = ((1, 1), (1, 0), (0, 1), (2, 1), (1, 2), (3, 1), (1, 3), (3, 2), (2, 3))
RIDGE = 1e-5  # keeps the weights of neighbours that are always zero finite
FLAT = 1e-6  # guesses that differ by less are one guess


def guess(board: Checkerboard, flat_NL: Flat, low_C: Indexes, high_C: Indexes) -> ContextWeights:
    """Weights that predict each integer by least squares, scaled so that guesses cover a phase's contexts."""
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
    """For each phase and channel, over M positions of all inputs: integers, horizontal and vertical sums, ends."""
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
    """The weights of horizontal and vertical sums, of RATIOS, that explain the most variance of the target."""
    centred_M2 = sums_M2 - sums_M2.mean(0)
    squares_22, products_2 = centred_M2.T @ centred_M2, centred_M2.T @ (target_M - target_M.mean())
    near_R2 = np.array(RATIOS)
    power_R = np.einsum("ri,ij,rj->r", near_R2, squares_22, near_R2)
    explained_R = (near_R2 @ products_2) ** 2 / np.maximum(power_R, FLAT)
    return RATIOS[int(explained_R.argmax())]


def units(features_M6: Floats, target_M: Floats, contexts: int) -> Floats:
    """Integer weights by least squares, shifted and scaled so that guesses cover the contexts.

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
