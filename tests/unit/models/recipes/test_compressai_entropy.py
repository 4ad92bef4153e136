from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from models.codecs.factorized import FactorizedCodec
from models.recipes.compressai_entropy import EntropyBottleneck, freeze, new_prior


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
    line = "import models.recipes.compressai_entropy as c; import torchvision; print(c.new_prior(2).channels)"
    done = subprocess.run([sys.executable, "-c", line], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "2\n"), done.stderr


def test_frozen_frequencies_are_positive_and_add_up(prior: EntropyBottleneck) -> None:
    tables = freeze(prior, torch.ones(3))
    assert len(tables.frequencies) == 3
    for frequencies in tables.frequencies:
        assert frequencies.dtype == np.int64
        assert frequencies.min() >= 1
        assert frequencies.sum() == 1 << 16


def test_frozen_tables_hold_zero(prior: EntropyBottleneck) -> None:
    tables = freeze(prior, torch.ones(3))
    assert (tables.first_C <= 0).all()
    assert (tables.last_C >= 0).all()


def test_the_gain_goes_into_the_tables(prior: EntropyBottleneck) -> None:
    tables = freeze(prior, torch.tensor([1.0, 2.0, 0.5]))
    assert tables.gain_C.tolist() == [1.0, 2.0, 0.5]
    assert tables.gain_C.dtype == np.float32


def test_our_coder_and_compressais_agree_on_the_size_within_1_percent(prior: EntropyBottleneck) -> None:
    codec = FactorizedCodec((freeze(prior, torch.ones(3)),), (3, 40, 40), 1 << 16)
    latent_CHW = (np.random.default_rng(0).normal(size=(3, 40, 40)) * 4).astype(np.float32)
    ours = codec.encode(codec.quantise(latent_CHW, 0), 0)
    theirs = prior.compress(torch.from_numpy(latent_CHW[None]))[0]
    assert len(ours) == pytest.approx(len(theirs), rel=0.01)


def test_both_coders_give_back_the_same_integers(prior: EntropyBottleneck) -> None:
    codec = FactorizedCodec((freeze(prior, torch.ones(3)),), (3, 8, 8), 1 << 16)
    latent_CHW = (np.random.default_rng(1).normal(size=(3, 8, 8)) * 4).astype(np.float32)
    ours_CHW = codec.decode(codec.encode(codec.quantise(latent_CHW, 0), 0), 0)
    theirs_BCHW = prior.decompress(prior.compress(torch.from_numpy(latent_CHW[None])), (8, 8))
    np.testing.assert_array_equal(ours_CHW, theirs_BCHW[0].numpy())


def test_training_never_moves_the_medians_from_zero() -> None:
    assert not new_prior(2).quantiles.requires_grad
    assert (new_prior(2).quantiles[:, 0, 1] == 0).all()
