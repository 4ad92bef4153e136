"""CompressAI's EntropyBottleneck, importable with CPU PyTorch.

CompressAI imports torchvision, whose operators are missing with CPU PyTorch; only their schemas must exist. Import
CompressAI through this module only.
"""

from __future__ import annotations

import torch
from torch import Tensor


def declare_torchvision_schemas() -> None:
    """Declare `nms` and `qnms` unless a real torchvision operator library has done so."""
    if not hasattr(torch.ops.torchvision, "nms"):
        for name in ("nms", "qnms"):
            _SCHEMAS.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")  # type: ignore[no-untyped-call]


_SCHEMAS = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
declare_torchvision_schemas()

from compressai.entropy_models import EntropyBottleneck  # noqa: E402
from compressai.layers import GDN1  # noqa: E402

INIT_SCALE = 2.0  # integers; from CompressAI's 10 it takes a thousand steps to converge

__all__ = ["GDN1", "EntropyBottleneck", "likelihood_of", "new_prior", "ready"]


def new_prior(channels: int) -> EntropyBottleneck:
    """A factorized prior whose medians stay at zero, so that integers are plain rounded values."""
    prior = EntropyBottleneck(channels, init_scale=INIT_SCALE)
    prior.quantiles.requires_grad_(False)
    return prior


def likelihood_of(prior: EntropyBottleneck, values_BCHW: Tensor) -> Tensor:
    """Probability of each value under its channel's prior, without noise; gradients reach both."""
    values_CN = values_BCHW.transpose(0, 1).reshape(values_BCHW.shape[1], 1, -1)
    likelihood_CN, *_ = prior._likelihood(values_CN)
    bounded_CN: Tensor = prior.likelihood_lower_bound(likelihood_CN)
    return bounded_CN.reshape(values_BCHW.transpose(0, 1).shape).transpose(0, 1)


@torch.no_grad()
def ready(prior: EntropyBottleneck) -> None:
    """Build CompressAI's integer tables of a trained prior, so that it can compress."""
    prior._update_quantiles()
    prior.quantiles[:, 0, 1] = 0
    prior.update(force=True)
