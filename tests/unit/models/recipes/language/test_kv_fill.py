"""KV fill: maps in closed form, and distilled, over a tiny model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from isthmus.models.language.checkpoint.checkpoint import Checkpoint
from isthmus.models.language.packing import unpacked
from isthmus.models.language.torch.kv_fill import normalised
from isthmus.models.recipes.common.trainer import Run
from isthmus.models.recipes.language import kv_fill as language_fill
from isthmus.models.recipes.language import suffix
from isthmus.models.recipes.language.corpus import Corpus
from isthmus.models.recipes.language.kv_fill import (
    Divergence,
    FillMaps,
    batches,
    fit_maps,
    keys_values,
    run_filled,
    train_maps,
)
from isthmus.models.recipes.language.llama import Llama
from isthmus.models.recipes.language.suffix import ApproximateKV, run_suffix
from isthmus.models.recipes.language.teacher import TeacherOutputs, run_teacher
from tests.bench.tiny_llama import write_tiny_llama

LAYERS, TOKENS, FIRST, EXACT = 3, 40, 3, 6


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Llama:
    folder = write_tiny_llama(tmp_path_factory.mktemp("models") / "tiny", layers=LAYERS)
    return Llama.load(Checkpoint.open(folder), torch.float32)


@pytest.fixture(scope="module")
def teacher(model: Llama) -> TeacherOutputs:
    rng = np.random.default_rng(0)
    corpus = Corpus.from_sequences([(rng.integers(3, 259, TOKENS).tolist(), TOKENS) for _ in range(9)])
    return run_teacher(model, corpus, range(LAYERS + 1), torch.float32)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts of TOKENS, prompts of half of that."""
    for module, name, value in (
        (language_fill, "LONG_TOKENS", TOKENS),
        (language_fill, "MIN_PROMPT", TOKENS // 2),
        (language_fill, "FOLLOWING", 8),
        (language_fill, "EXACT_FIRST", FIRST),
        (language_fill, "EXACT_LAST", EXACT),
        (suffix, "EXACT_LAST", EXACT),
    ):
        monkeypatch.setattr(module, name, value)


def off(model: Llama, maps: FillMaps, teacher: TeacherOutputs) -> float:
    """KL divergence after filled prefixes."""
    found = []
    for batch in batches(teacher, 1, LAYERS, torch.Generator().manual_seed(5)):
        with torch.no_grad():
            states_MH = run_filled(model, maps, 1, batch.x_BTH, batch.exact).flatten(0, 1)
            own, expected = (model.logits(each).log_softmax(1) for each in (states_MH, batch.last_MH))
        found.append(float((expected.exp() * (expected - own)).sum(1).mean()))
    return sum(found) / len(found)


def test_the_first_layers_approximate_kv_is_its_own(model: Llama, teacher: TeacherOutputs) -> None:
    tensors = fit_maps(model, teacher, 1).tensors()
    bias_LO = torch.from_numpy(tensors["bias"]).float()
    weight_LOH = torch.from_numpy(unpacked(tensors, "weight")).view(*bias_LO.shape, -1)
    expected_NO = keys_values(model.layers[1], teacher.states[1])
    found_NO = normalised(teacher.states[1].float()) @ weight_LOH[0].T + bias_LO[0]
    assert (found_NO - expected_NO).square().mean() < 0.01 * expected_NO.square().mean()


@pytest.mark.usefixtures("short")
def test_training_and_measurement_agree_on_a_filled_text(
    model: Llama, teacher: TeacherOutputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training computes some of the positions, measurement all of them under a mask."""
    monkeypatch.setattr(language_fill, "EXACT_FIRST", 1)
    maps = fit_maps(model, teacher, 1)
    maps.weight_LOH.data = maps.stored_LOH().detach()
    fill = ApproximateKV(maps.weight_LOH.detach(), maps.bias_LO.detach(), prompts_only=True)
    prompt = 25
    one = replace(teacher.select(4), answers=(prompt,))
    expected = run_suffix(model, one, 1, fill)
    with torch.no_grad():
        states_TH = run_filled(model, maps, 1, one.states[1][None], prompt - EXACT)[0]
    logprobs_TV = model.logits(states_TH).log_softmax(1)
    assert logprobs_TV.argmax(1).tolist() == expected.chosen_N[prompt - EXACT :].tolist()
    next_T = logprobs_TV[:-1].gather(1, one.ids_N[prompt - EXACT + 1 :, None])[:, 0]
    torch.testing.assert_close(next_T, expected.next_N[prompt - EXACT : -1], atol=1e-4, rtol=1e-4)


@pytest.mark.usefixtures("short")
def test_the_first_tokens_are_exact(model: Llama, teacher: TeacherOutputs) -> None:
    nothing = FillMaps(torch.zeros(2, 64, model.config.hidden), torch.zeros(2, 64))
    first, end = teacher.bounds(2)
    states_1TH = teacher.states[1][None, first:end]
    with torch.no_grad():
        exact, filled = (
            run_filled(model, nothing, 1, states_1TH, first_filled)[0, :1] for first_filled in (FIRST, FIRST + 1)
        )
    torch.testing.assert_close(exact, teacher.states[LAYERS][first + FIRST : first + FIRST + 1], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(filled, teacher.states[LAYERS][first + FIRST + 1 : first + FIRST + 2], atol=1e-2)


@pytest.mark.usefixtures("short")
def test_batches_have_each_text_once_with_the_models_output_for_its_end(teacher: TeacherOutputs) -> None:
    found = list(batches(teacher, 1, LAYERS, torch.Generator().manual_seed(0)))
    firsts = [row.tolist() for batch in found for row in batch.x_BTH[:, 1]]
    assert len(found) == 4 and len({tuple(row) for row in firsts}) == 8
    for batch in found:
        _, tokens, hidden = batch.x_BTH.shape
        assert TOKENS // 2 - EXACT <= batch.exact <= TOKENS - 8 - EXACT and tokens == batch.exact + EXACT + 8
        place = int((teacher.states[1] == batch.x_BTH[0, batch.exact]).all(1).nonzero())
        assert torch.equal(batch.last_MH.view(2, -1, hidden)[0, 0], teacher.states[LAYERS][place])


def test_the_divergence_and_its_gradient_are_those_of_autograd() -> None:
    torch.manual_seed(0)
    states_MH, teacher_MH, head_VH = torch.randn(30, 8, requires_grad=True), torch.randn(30, 8), torch.randn(50, 8)
    expected_MV = F.linear(teacher_MH, head_VH).log_softmax(1)
    by_hand = F.kl_div(F.linear(states_MH, head_VH).log_softmax(1), expected_MV, reduction="batchmean", log_target=True)
    loss = Divergence.apply(states_MH, teacher_MH, head_VH)
    torch.testing.assert_close(loss, by_hand)
    torch.testing.assert_close(*(torch.autograd.grad(3 * each, states_MH)[0] for each in (loss, by_hand)))
    assert float(Divergence.apply(teacher_MH, teacher_MH, head_VH)) == pytest.approx(0, abs=1e-6)


@pytest.mark.usefixtures("short")
def test_distilled_maps_change_later_predictions_less(
    model: Llama, teacher: TeacherOutputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(language_fill, "EPOCHS", 40)
    maps = fit_maps(model, teacher, 1)
    before = off(model, maps, teacher)
    assert 0 < off(model, train_maps(Run(tmp_path, 0), maps, model, teacher, 1), teacher) < 0.8 * before
