"""Confidence intervals of measured fractions."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest

from isthmus.models.bundle.manifest import Interval

Bools = NDArray[np.bool_]


def interval(right_N: Bools) -> Interval:
    """The fraction of true values with its 95 % Wilson interval."""
    low, high = binomtest(int(right_N.sum()), len(right_N)).proportion_ci(0.95, method="wilson")
    return Interval(value=float(right_N.mean()), low=float(low), high=float(high), samples=len(right_N))
