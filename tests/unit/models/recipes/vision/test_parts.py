from __future__ import annotations

import pytest
import torch
from torch import nn

from isthmus.models.errors import BundleError
from isthmus.models.recipes.vision.parts import halve, macs
from isthmus.models.vision.bundle import Bundle
from isthmus.models.vision.tail import widened


def test_shapes_in_the_manifest_are_those_of_the_network(bundle: Bundle) -> None:
    manifest = bundle.manifest
    assert [s.output for s in manifest.segments] == [(16, 32, 32), (40, 8, 8)]
    assert [tap.latent for tap in manifest.taps] == [(3, 8, 8), (4, 8, 8)]


def test_multiplications_are_counted_as_by_hand() -> None:
    assert macs(nn.Conv2d(3, 8, 3, padding=1, bias=False), torch.zeros(1, 3, 4, 4)) == 3 * 8 * 9 * 16


def test_matrices_are_halved_in_the_network_too() -> None:
    """What is measured is what is stored: the network is rounded in place."""
    torch.manual_seed(0)
    layer = nn.Linear(3, 2)
    stored = halve(layer)  # type: ignore[arg-type]
    assert (stored["weight"].dtype, stored["bias"].dtype) == (torch.float16, torch.float32)
    assert torch.equal(layer.weight, stored["weight"].float())


def test_what_only_the_cloud_runs_is_stored_in_8_bits() -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 4, 3)
    with torch.no_grad():
        layer.weight[2] = 0
    before = layer.weight.detach().clone()
    stored = halve(layer, {"weight"})  # type: ignore[arg-type]
    assert (stored["weight"].dtype, stored["weight.scale"].shape) == (torch.int8, (4,))
    assert stored["weight"].abs().amax((1, 2, 3)).tolist() == [127, 127, 0, 127]
    torch.testing.assert_close(widened(stored)["weight"], layer.weight.detach(), rtol=0, atol=0)
    torch.testing.assert_close(layer.weight.detach(), before, rtol=0, atol=float(before.abs().max()) / 254)
    with pytest.raises(BundleError, match="lacks a scale"):
        widened({"weight": stored["weight"]})
