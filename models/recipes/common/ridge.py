"""Ridge regression in closed form, in double precision."""

from __future__ import annotations

import torch
from torch import Tensor


def ridge(gram_II: Tensor, moment_IO: Tensor, penalty: float) -> Tensor:
    """The weight (O, I) of y on x without a constant, from x.T @ x and x.T @ y; `penalty` is added to the diagonal."""
    gram_II = gram_II.double() + penalty * torch.eye(len(gram_II), dtype=torch.double)
    weight_IO: Tensor = torch.linalg.solve(gram_II, moment_IO.double())
    return weight_IO.T.float()


def affine_ridge(x_NI: Tensor, y_NO: Tensor, strength: float) -> tuple[Tensor, Tensor]:
    """Weight (O, I) and bias (O,) of the regression of y on x; `strength` in mean variances of x."""
    x_mean_I, y_mean_O = x_NI.mean(0), y_NO.mean(0)
    x_NI, y_NO = (x_NI - x_mean_I).double(), (y_NO - y_mean_O).double()
    gram_II = x_NI.T @ x_NI
    weight_OI = ridge(gram_II, x_NI.T @ y_NO, strength * gram_II.diagonal().mean().item())
    return weight_OI, y_mean_O - weight_OI @ x_mean_I
