"""Ridge regression in closed form, in double precision."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def ridge(gram_II: NDArray[Any], moment_IO: NDArray[Any], penalty: float) -> NDArray[np.float64]:
    """The weight (I, O) of y on x without a constant, from x.T @ x and x.T @ y; `penalty` is added to the diagonal.

    Without the last axis for a single y.
    """
    return np.linalg.solve(gram_II.astype(np.float64) + penalty * np.eye(len(gram_II)), moment_IO)


def affine_ridge(x_NI: Tensor, y_NO: Tensor, strength: float) -> tuple[Tensor, Tensor]:
    """Weight (O, I) and bias (O,) of the regression of y on x; `strength` in mean variances of x."""
    x_mean_I, y_mean_O = x_NI.mean(0), y_NO.mean(0)
    x_NI, y_NO = (x_NI - x_mean_I).double(), (y_NO - y_mean_O).double()
    gram_II, moment_IO = (x_NI.T @ x_NI).numpy(), (x_NI.T @ y_NO).numpy()
    weight_IO = ridge(gram_II, moment_IO, strength * float(gram_II.diagonal().mean()))
    weight_OI = torch.from_numpy(weight_IO).T.float()
    return weight_OI, y_mean_O - weight_OI @ x_mean_I
