"""CompressAI's EntropyBottleneck, importable without torchvision. Import CompressAI through this module only.

CompressAI asks for torchvision, of which PyPI has no build for PyTorch without CUDA; `make env` removes one that does
not fit. CompressAI registers the names of `torchvision.transforms` and needs none of them here.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec

import torch
import torch_geometric.transforms  # noqa: F401  # CompressAI's; it imports transformers, which must not see the stand-in
from torch import Tensor


@contextmanager
def torchvision_or_nothing() -> Iterator[None]:
    """While CompressAI is imported, empty modules stand in for a torchvision that is absent or does not fit."""
    names: tuple[str, ...] = ()
    try:
        import torchvision.transforms  # noqa: F401
    except (ImportError, RuntimeError):  # absent; its operators are built for another PyTorch
        names = ("torchvision", "torchvision.transforms")
    sys.modules.update({name: module_from_spec(ModuleSpec(name, None)) for name in names})
    if names:
        setattr(sys.modules[names[0]], "transforms", sys.modules[names[1]])  # noqa: B010
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]


with torchvision_or_nothing():
    from compressai.entropy_models import EntropyBottleneck
    from compressai.layers import GDN1

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
