from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

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


def fresh(line: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", line], capture_output=True, text=True, check=False, env=os.environ | environment
    )


@pytest.mark.skipif(find_spec("torchvision") is None, reason="PyPI has no torchvision for this PyTorch")
def test_torchvision_is_built_for_this_pytorch() -> None:
    done = fresh("import torchvision")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "error", ["ModuleNotFoundError('none')", "RuntimeError('operator torchvision::nms does not exist')"]
)
def test_imports_where_torchvision_is_absent_or_does_not_fit(tmp_path: Path, error: str) -> None:
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(f"raise {error}", encoding="utf-8")
    module = "isthmus.models.recipes.vision.compressai_entropy"
    line = f"import sys, {module} as c; print(c.new_prior(2).channels, 'torchvision' in sys.modules)"
    done = fresh(line, PYTHONPATH=str(tmp_path))
    assert (done.returncode, done.stdout) == (0, "2 False\n"), done.stderr


def test_transformers_is_importable_after_it() -> None:
    module = "isthmus.models.recipes.vision.compressai_entropy"
    done = fresh(f"import {module}; from transformers import LlamaForCausalLM; print('yes')")
    assert (done.returncode, done.stdout) == (0, "yes\n"), done.stderr


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
