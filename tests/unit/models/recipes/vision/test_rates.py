from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from isthmus.models.recipes.vision.rates import ENOUGH_POSITIONS, Rates, integers, thinned
from isthmus.models.recipes.vision.views import make_views


@pytest.fixture
def rates() -> Rates:
    torch.manual_seed(0)
    return Rates(3, (4.0, 1.0))


def test_the_cloud_gets_multiples_of_the_step(rates: Rates) -> None:
    latent, rate_B = torch.randn(4, 3, 5, 5), torch.tensor([0, 1, 0, 1])
    bits_B, got = rates(latent, rate_B)
    steps = 1 / rates.log_gain_RC.detach().exp()[rate_B][:, :, None, None]
    torch.testing.assert_close(got / steps, (got / steps).round(), rtol=0, atol=1e-4)
    assert ((got - latent).abs() <= steps / 2 + 1e-5).all()
    assert bits_B.shape == (4,)
    assert (bits_B > 0).all()


def test_finer_steps_cost_more_bits(rates: Rates) -> None:
    latent = torch.randn(2, 3, 6, 6) * 3
    bits_B, _ = rates(latent[:1].repeat(2, 1, 1, 1), torch.tensor([0, 1]))
    assert bits_B[0] < bits_B[1]


def test_gradients_reach_latent_gains_and_the_prior_in_use(rates: Rates) -> None:
    latent = torch.randn(2, 3, 5, 5, requires_grad=True)
    bits_B, got = rates(latent, torch.tensor([1, 1]))
    (bits_B.sum() + got.square().sum()).backward()
    assert latent.grad is not None
    assert rates.log_gain_RC.grad is not None
    assert rates.log_gain_RC.grad[1].abs().min() > 0 == rates.log_gain_RC.grad[0].abs().max()
    assert any(p.grad is not None for p in rates.priors[1].parameters())
    assert all(p.grad is None for p in rates.priors[0].parameters())


def test_the_price_is_of_kilobytes_at_each_rate(rates: Rates) -> None:
    price, figures = rates.price(torch.tensor([8192.0, 16384.0]), torch.tensor([0, 1]))
    assert price.item() == pytest.approx((4.0 * 1 + 1.0 * 2) / 2)
    assert figures == {"bytes0": 1024.0, "bytes1": 2048.0}


def test_integers_are_rounded_latents_times_the_gain(rates: Rates) -> None:
    latent = torch.randn(2, 3, 4, 4)
    wanted = np.rint(latent.numpy() * rates.gains_RC[1][:, None, None])
    assert (rates.integers(latent, 1) == wanted).all()


def test_priors_learn_faster_than_gains_and_networks() -> None:
    rates = Rates(2, (1.0,), lr_scale=10.0)
    scales = {getattr(p, "lr_scale", 1.0) for p in rates.priors.parameters()}
    assert (scales, getattr(rates.log_gain_RC, "lr_scale", 1.0)) == ({10.0}, 1.0)


@pytest.mark.parametrize("side", [4, 20, 38, 75])
def test_thinned_positions_stand_for_all(side: int) -> None:
    seen, times = thinned(torch.zeros(1, 2, side, side))
    positions = seen.shape[2] * seen.shape[3]
    assert times * positions == pytest.approx(side * side)
    assert positions <= 2 * ENOUGH_POSITIONS
    assert positions == side * side or positions > ENOUGH_POSITIONS / 2


def test_integers_are_collected_for_each_rate(tmp_path: Path) -> None:
    images_NHW = np.random.default_rng(0).integers(0, 256, (40, 16, 16), dtype=np.uint8)
    views = make_views(tmp_path, images_NHW, seed=0)
    rates = Rates(1, (1.0, 0.1))
    coarse, fine = integers(views.passes[0]["images"], lambda images_BHW: images_BHW.unsqueeze(1), rates)
    images = np.asarray(views.passes[0]["images"], np.float32)[:, None]
    np.testing.assert_array_equal(coarse, np.rint(images * rates.gains_RC[0, 0]))
    assert fine.shape == (40, 1, 16, 16)
    assert fine.std() > coarse.std()


def test_hard_bits_are_those_of_the_integers() -> None:
    """Values that round to zero cost what zeros cost, wherever they lie; noise would carry some over to one."""
    torch.manual_seed(0)
    rates = Rates(3, (1.0,), log_gains=(0.0, 0.0), hard=True)
    near, zeros = torch.full((1, 3, 5, 5), 0.4), torch.zeros(1, 3, 5, 5)
    rate_B = torch.tensor([0])
    torch.testing.assert_close(rates(near, rate_B)[0], rates(zeros, rate_B)[0])
    assert rates(near + 12, rate_B)[0] > rates(zeros, rate_B)[0]


def test_hard_bits_have_gradients() -> None:
    torch.manual_seed(0)
    rates = Rates(3, (1.0,), log_gains=(0.0, 0.0), hard=True)
    latent = torch.full((1, 3, 5, 5), 12.2, requires_grad=True)
    rates(latent, torch.tensor([0]))[0].sum().backward()
    assert latent.grad is not None
    assert (latent.grad > 0).all()  # larger values are dearer
    assert any(p.grad is not None for p in rates.priors[0].parameters())
