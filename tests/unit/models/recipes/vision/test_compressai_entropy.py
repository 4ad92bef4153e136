from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from isthmus.models.recipes.vision.compressai_entropy import EntropyBottleneck, new_prior, ready


@pytest.fixture(scope="module")
def prior() -> EntropyBottleneck:
    """A prior of three channels, moved a little from where it starts."""
    torch.manual_seed(0)
    prior = new_prior(3)
    with torch.no_grad():
        for parameter in prior.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return prior.eval()


def test_imports_in_a_fresh_process_whose_torchvision_has_no_operators() -> None:
    module = "isthmus.models.recipes.vision.compressai_entropy"
    line = f"import {module} as c; import torchvision; print(c.new_prior(2).channels)"
    done = subprocess.run([sys.executable, "-c", line], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "2\n"), done.stderr


def test_a_ready_prior_gives_back_what_it_compressed(prior: EntropyBottleneck) -> None:
    ready(prior)
    scaled = torch.randn(2, 3, 8, 8) * 4
    strings = prior.compress(scaled)
    assert torch.equal(prior.decompress(strings, (8, 8)), scaled.round())  # medians at zero: plain rounding


def test_a_ready_priors_bytes_are_what_training_estimates(prior: EntropyBottleneck) -> None:
    ready(prior)
    integers = (torch.randn(1, 3, 40, 40) * 4).round()
    _, likelihood = prior(integers, training=False)
    assert 8 * len(prior.compress(integers)[0]) == pytest.approx(-likelihood.log2().sum().item(), rel=0.02)


def test_training_never_moves_the_medians_from_zero() -> None:
    assert not new_prior(2).quantiles.requires_grad
    assert (new_prior(2).quantiles[:, 0, 1] == 0).all()
