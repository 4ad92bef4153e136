from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from isthmus.models.recipes.vision.distil import Distillation, relative_distance
from isthmus.models.vision.split import SplitClassifier

RATES = (2.0, 0.2)


@pytest.fixture
def module(tiny_split: SplitClassifier) -> Distillation:
    torch.manual_seed(0)
    return Distillation(copy.deepcopy(tiny_split), 1, RATES)


@pytest.fixture(scope="module")
def batch() -> tuple[Tensor, Tensor]:
    """Eight images with two-class targets."""
    torch.manual_seed(3)
    return torch.rand(8, 3, 64, 64) * 2 - 1, torch.eye(2).repeat(4, 1)


def train(module: Distillation, batch: tuple[Tensor, Tensor], steps: int) -> list[float]:
    """Losses of a few steps of Adam on one batch."""
    torch.manual_seed(4)
    optimizer = torch.optim.Adam([p for p in module.parameters() if p.requires_grad], lr=3e-3)
    module.train()
    losses = []
    for _ in range(steps):
        loss, _ = module.loss(*batch)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.item())
    return losses


def state(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def moved(module: torch.nn.Module, before: dict[str, Tensor]) -> set[str]:
    """Names of the tensors that are not what they were, to the bit."""
    return {name for name, tensor in module.state_dict().items() if not torch.equal(tensor, before[name])}


def test_the_loss_falls_on_one_batch(module: Distillation, batch: tuple[Tensor, Tensor]) -> None:
    losses = train(module, batch, steps=8)
    assert losses[-1] < 0.9 * losses[0]


def test_the_cloud_model_stays_as_it_is(module: Distillation, batch: tuple[Tensor, Tensor]) -> None:
    before = state(module.split.backbone)
    train(module, batch, steps=2)
    assert moved(module.split.backbone, before) == set()


def test_the_first_stage_moves_everything_else(module: Distillation, batch: tuple[Tensor, Tensor]) -> None:
    before = {name: tensor.detach().clone() for name, tensor in module.named_parameters() if tensor.requires_grad}
    train(module, batch, steps=2)
    stayed = {
        name for name, tensor in module.named_parameters() if name in before and torch.equal(tensor, before[name])
    }
    assert stayed == set()


def test_the_second_stage_trains_the_decoder_alone(module: Distillation, batch: tuple[Tensor, Tensor]) -> None:
    """What decides the bytes is settled: weights, gains and priors stay as they are, to the bit."""
    module.freeze_encoder()
    before = state(module)
    train(module, batch, steps=2)
    names = moved(module, before) & dict(module.named_parameters()).keys()
    assert {name.split(".decoder.")[0] for name in names} == {"split.taps.1"}


def test_the_second_stage_leaves_running_statistics_of_what_is_frozen(
    module: Distillation, batch: tuple[Tensor, Tensor]
) -> None:
    """Encoder and exits answer in the shipped bundle exactly as they did when they were frozen."""
    module.freeze_encoder()
    before = state(module)
    train(module, batch, steps=2)
    assert {name.split(".decoder.")[0] for name in moved(module, before)} == {"split.taps.1"}


def test_figures_tell_the_bytes_of_each_rate(module: Distillation, batch: tuple[Tensor, Tensor]) -> None:
    _, figures = module.loss(*batch)
    assert figures.keys() == {"clean", "task", "exits", "features", "bytes0", "bytes1"}
    assert 0 < figures["bytes0"] < figures["bytes1"]  # the finer steps cost more


def test_the_rate_is_what_the_price_weighs(tiny_split: SplitClassifier, batch: tuple[Tensor, Tensor]) -> None:
    losses = []
    for price in (0.0, 1000.0):
        torch.manual_seed(0)
        module = Distillation(copy.deepcopy(tiny_split), 1, (price,))
        torch.manual_seed(1)
        loss, figures = module.loss(*batch)
        losses.append(loss.item())
    assert losses[1] - losses[0] == pytest.approx(1000 * figures["bytes0"] / 1024, rel=1e-3)


def test_distance_is_in_units_of_the_wanted_variance() -> None:
    torch.manual_seed(0)
    wanted = torch.randn(1000) * 7
    assert relative_distance(wanted, wanted).item() == 0
    assert relative_distance(wanted, wanted.mean().expand(1000)).item() == pytest.approx(1, rel=0.01)
