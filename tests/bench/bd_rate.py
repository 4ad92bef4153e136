"""Change of bytes at equal quality: Bjontegaard's delta rate from few, noisy settings, with a paired bootstrap.

Knows nothing about codecs: arrays in, arrays out. Legend: R resamples (row 0 is the sample itself), S settings of one
method, N photos, Q qualities.

    right_SN, bytes_SN --weights_RN--> quality_RS, bytes_RS --envelope--> Curves --> bd_rate, bytes_at --> Estimate

A method's curve is the upper envelope of its settings: its quality at b bytes is the best of the settings that cost at
most b, which an operator would choose. So it rises by construction, two families (a codec with and without halving the
photo) merge into one curve, and dominated settings have no effect. The alternative, isotonic regression, averages
neighbours, so bad settings would count against a method. The maximum of several noisy figures is biased upwards, the
more so the more settings a method has; every resample computes its own envelope, so that the interval covers this.
Between settings log2(bytes) is linear in quality: no polynomial can overshoot.

Source: Bjontegaard, "Calculation of average PSNR differences between RD-curves", VCEG-M33, 2001: mean difference of
log-rate over the range of quality that both curves reach; NaN where they share none.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Curves:
    """One rising curve a resample; dropped settings repeat their neighbours."""

    quality_RS: Floats
    log2_bytes_RS: Floats


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % percentile interval. None: undefined; `undefined` is the share of such resamples."""

    value: float | None
    low: float | None
    high: float | None
    undefined: float


def resampling_weights(photos: int, resamples: int, seed: int = 0) -> Floats:
    """weights_RN, rows adding up to 1: the sample itself, then `resamples` draws of as many photos with replacement.

    All methods use the same rows, so that the resampling is paired.
    """
    draws_RN = np.random.default_rng(seed).multinomial(photos, np.full(photos, 1 / photos), size=resamples)
    weights_RN: Floats = np.concatenate([np.ones((1, photos)), draws_RN]) / photos
    return weights_RN


def envelope(bytes_RS: Floats, quality_RS: Floats) -> Curves:
    """The curve through the settings that no other dominates, given in any order. Means below one byte count as one."""
    log2_RS = np.log2(np.maximum(bytes_RS, 1.0))
    order_RS = np.lexsort((-quality_RS, log2_RS), axis=-1)
    log2_RS = np.take_along_axis(log2_RS, order_RS, 1)
    best_RS = np.maximum.accumulate(np.take_along_axis(quality_RS, order_RS, 1), axis=1)
    rises_RS = np.diff(best_RS, axis=1, prepend=-np.inf) > 0
    kept_RS = np.maximum.accumulate(np.where(rises_RS, np.arange(best_RS.shape[1]), 0), axis=1)
    return Curves(best_RS, np.take_along_axis(log2_RS, kept_RS, 1))


def bytes_at(curves: Curves, quality_RQ: Floats) -> Floats:
    """Bytes at a quality; those of the cheapest setting below its quality; NaN above the best."""
    log2_RQ, _ = interpolate(curves, quality_RQ)
    return np.where(quality_RQ > curves.quality_RS[:, -1:], np.nan, np.exp2(log2_RQ))


def shared_quality(ours: Curves, theirs: Curves) -> tuple[Floats, Floats]:
    """low_R and high_R of the qualities that both curves cover; empty where low is not below high."""
    low_R = np.maximum(ours.quality_RS[:, 0], theirs.quality_RS[:, 0])
    return low_R, np.minimum(ours.quality_RS[:, -1], theirs.quality_RS[:, -1])


def bd_rate(ours: Curves, theirs: Curves) -> Floats:
    """Mean change of bytes at equal quality, as a fraction: -0.5 for half of theirs; NaN without shared quality."""
    return mean_change(ours, theirs, *shared_quality(ours, theirs))


def bd_rate_at_most(ours: Curves, theirs: Curves) -> Floats:
    """An upper bound of the change over their range as far as ours reaches; below our cheapest setting its bytes count.

    Those bytes also give any lower quality, so the bound exists where ours is better throughout; NaN where it is worse.
    """
    return mean_change(
        ours, theirs, theirs.quality_RS[:, 0], np.minimum(ours.quality_RS[:, -1], theirs.quality_RS[:, -1])
    )


def mean_change(ours: Curves, theirs: Curves, low_R: Floats, high_R: Floats) -> Floats:
    """Geometric mean of the ratio of bytes minus one, over a range of quality; NaN where that is empty."""
    defined_R = high_R > low_R
    ends_R2 = np.stack([low_R, np.where(defined_R, high_R, low_R)], 1)
    areas_R = [np.diff(interpolate(curves, ends_R2)[1], axis=1)[:, 0] for curves in (ours, theirs)]
    mean_R = (areas_R[0] - areas_R[1]) / np.where(defined_R, high_R - low_R, np.nan)
    change_R: Floats = np.exp2(mean_R) - 1
    return change_R


def interpolate(curves: Curves, quality_RQ: Floats) -> tuple[Floats, Floats]:
    """log2(bytes) at qualities, held at the ends, and its integral over quality from the curve's lowest point."""
    x_RS, y_RS = curves.quality_RS, curves.log2_bytes_RS
    within_RQ = np.clip(quality_RQ, x_RS[:, :1], x_RS[:, -1:])
    right_RQ = (x_RS[:, None, :] < within_RQ[:, :, None]).sum(2)
    left_RQ = np.maximum(right_RQ - 1, 0)
    x0_RQ, x1_RQ = (np.take_along_axis(x_RS, index_RQ, 1) for index_RQ in (left_RQ, right_RQ))
    y0_RQ, y1_RQ = (np.take_along_axis(y_RS, index_RQ, 1) for index_RQ in (left_RQ, right_RQ))
    share_RQ = (within_RQ - x0_RQ) / np.where(x1_RQ > x0_RQ, x1_RQ - x0_RQ, 1.0)
    y_RQ = y0_RQ + share_RQ * (y1_RQ - y0_RQ)
    pieces_RS = np.diff(x_RS, axis=1, prepend=x_RS[:, :1]) * (y_RS + np.roll(y_RS, 1, 1)) / 2
    areas_RS = np.cumsum(pieces_RS, axis=1)
    held_RQ = np.minimum(quality_RQ - x_RS[:, :1], 0) * y_RS[:, :1]
    return y_RQ, np.take_along_axis(areas_RS, left_RQ, 1) + (within_RQ - x0_RQ) * (y0_RQ + y_RQ) / 2 + held_RQ


def estimate(values_R: Floats) -> Estimate:
    """Row 0 is the figure, the rest its bootstrap; undefined rows are counted and excluded from the interval."""
    value, resampled_R = values_R[0], values_R[1:]
    defined_R = resampled_R[~np.isnan(resampled_R)]
    low, high = np.percentile(defined_R, (2.5, 97.5)) if len(defined_R) else (np.nan, np.nan)
    undefined = 1 - len(defined_R) / len(resampled_R) if len(resampled_R) else float(np.isnan(value))
    return Estimate(finite(value), finite(low), finite(high), undefined)


def finite(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
