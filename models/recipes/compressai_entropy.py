"""CompressAI's EntropyBottleneck, importable beside CPU PyTorch, and its freezing into integer tables.

CompressAI imports torchvision, whose CPU operators are missing beside CPU PyTorch; it only needs their schemas to
exist. Import CompressAI through this module alone.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from models.codecs.factorized import RateTables


def declare_torchvision_schemas() -> None:
    """Declare `nms` and `qnms` unless a real torchvision operator library has done so."""
    if not hasattr(torch.ops.torchvision, "nms"):
        for name in ("nms", "qnms"):
            _SCHEMAS.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")  # type: ignore[no-untyped-call]


_SCHEMAS = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
declare_torchvision_schemas()

from compressai.entropy_models import EntropyBottleneck  # noqa: E402

INIT_SCALE = 2.0  # integers; CompressAI's 10 takes a thousand steps to come down

__all__ = ["EntropyBottleneck", "freeze", "new_prior"]


def new_prior(channels: int) -> EntropyBottleneck:
    """A factorized prior whose medians stay at zero, so that integers are plain rounded values."""
    prior = EntropyBottleneck(channels, init_scale=INIT_SCALE)
    prior.quantiles.requires_grad_(False)
    return prior


@torch.no_grad()
def freeze(prior: EntropyBottleneck, gain_C: Tensor) -> RateTables:
    """The integer tables of a trained prior: CompressAI's own 16-bit quantised CDFs."""
    prior._update_quantiles()
    prior.quantiles[:, 0, 1] = 0
    prior.update(force=True)
    cdfs_CL = prior._quantized_cdf.numpy().astype(np.int64)
    frequencies = tuple(np.diff(cdf[:length]) for cdf, length in zip(cdfs_CL, prior._cdf_length.tolist(), strict=True))
    return RateTables(
        gain_C=gain_C.numpy().astype(np.float32),
        first_C=prior._offset.numpy().astype(np.int32),
        frequencies=frequencies,
    )
