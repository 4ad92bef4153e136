"""Training of exits: loss over part of the vocabulary, batches, initialisation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from isthmus.models.recipes.language.exits import Exit, HeadLoss, batches, initialise, sample_vocab
from isthmus.models.recipes.language.llama import Llama
from isthmus.models.recipes.language.teacher import TeacherOutputs


def cross_entropy(states_MH: Tensor, head_VH: Tensor, top_MK: Tensor, weight_MK: Tensor) -> tuple[Tensor, Tensor]:
    """Of all logits, by autograd; and its gradient."""
    loss = -(weight_MK * F.linear(states_MH, head_VH).log_softmax(1).gather(1, top_MK)).sum(1).mean()
    return loss, torch.autograd.grad(loss, states_MH)[0]


@pytest.fixture
def answers() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, an output head, the teacher's tokens and their probabilities."""
    torch.manual_seed(0)
    states_MH, head_VH = torch.randn(700, 32, requires_grad=True), 0.3 * torch.randn(1000, 32)
    top_MK = torch.stack([torch.randperm(300)[:16] for _ in range(700)])
    weight_MK = torch.rand(700, 16)
    return (
        states_MH,
        head_VH,
        top_MK,
        weight_MK / (1.2 * weight_MK.sum(1, keepdim=True)),
    )  # the teacher's tokens are not all


def test_with_all_of_the_vocabulary_the_loss_is_the_cross_entropy_and_so_is_its_gradient(
    answers: tuple[Tensor, Tensor, Tensor, Tensor],
) -> None:
    states_MH, head_VH, top_MK, weight_MK = answers
    expected, gradient_MH = cross_entropy(*answers)
    part = sample_vocab(top_MK, 1000, 1000)
    assert sorted(part.ids_V.tolist()) == list(range(1000)) and not part.shift_V.any()
    found = HeadLoss.apply(states_MH, head_VH[part.ids_V], part.shift_V, part.top_MK, weight_MK)  # type: ignore[no-untyped-call]
    (3 * found).backward()
    torch.testing.assert_close(found, expected)
    assert states_MH.grad is not None
    torch.testing.assert_close(states_MH.grad, 3 * gradient_MH, atol=1e-7, rtol=1e-4)


def test_part_of_the_vocabulary_stands_for_all_of_it(answers: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    states_MH, head_VH, top_MK, weight_MK = answers
    expected, gradient_MH = cross_entropy(*answers)
    losses, gradients = [], []
    for _ in range(20):
        part = sample_vocab(top_MK, 1000, 200)
        assert len(part.ids_V) == len(part.ids_V.unique()) == 500 and torch.equal(part.ids_V[part.top_MK], top_MK)
        states_MH.grad = None
        loss = HeadLoss.apply(states_MH, head_VH[part.ids_V], part.shift_V, part.top_MK, weight_MK)  # type: ignore[no-untyped-call]
        loss.backward()
        assert states_MH.grad is not None
        losses.append(loss.item())
        gradients.append(states_MH.grad)
    assert sum(losses) / 20 == pytest.approx(expected.item(), rel=0.01)
    assert F.cosine_similarity(torch.stack(gradients).mean(0), gradient_MH, dim=1).mean() > 0.99


def test_batches_hold_each_chosen_token_once(teacher: TeacherOutputs) -> None:
    chosen = [0, 2, 3, 5]
    found = list(batches(teacher, 1, chosen, torch.Generator().manual_seed(0)))
    places = sorted(torch.cat([batch.positions_M for batch in found]).tolist())
    assert places == [place for s in chosen for place in range(*teacher.bounds(s))]
    for batch in found:
        torch.testing.assert_close(batch.x_BTH[batch.real_BT], teacher.states[1][batch.positions_M].float())


@pytest.mark.parametrize("count", [1, 2])
def test_an_exit_just_below_the_last_layers_is_initialised_as_the_model(
    model: Llama, teacher: TeacherOutputs, count: int
) -> None:
    """Its map is then the regression of the hidden states on themselves."""
    exit_ = Exit(model.config, model.config.layers - count, count)
    initialise(exit_, model, teacher)
    first, last = teacher.bounds(3)
    with torch.no_grad():
        logits_TV = F.linear(
            exit_(teacher.states[model.config.layers - count][None, first:last].float())[0], model.embedding_VH
        )
    assert (logits_TV.argmax(1) == teacher.top_NK[first:last, 0]).float().mean() > 0.7
