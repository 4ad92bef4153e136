"""KV fill: maps in closed form, and distilled, over a tiny model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from isthmus.models.language.checkpoint.checkpoint import Checkpoint
from isthmus.models.language.packing import unpacked
from isthmus.models.language.torch.kv_fill import normalised
from isthmus.models.recipes.common.trainer import Run
from isthmus.models.recipes.language import evaluate as language_figures
from isthmus.models.recipes.language import kv_fill as language_fill
from isthmus.models.recipes.language.evaluate import Fill, completed
from isthmus.models.recipes.language.exits import Traces, trace
from isthmus.models.recipes.language.kv_fill import Divergence, Maps, batches, fit_maps, keys_values, read, train_maps
from isthmus.models.recipes.language.llama import Llama
from isthmus.models.recipes.language.text import Texts
from tests.bench.tiny_llama import write_tiny_llama

LAYERS, TOKENS, FIRST, EXACT = 3, 40, 3, 6


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Llama:
    folder = write_tiny_llama(tmp_path_factory.mktemp("models") / "tiny", layers=LAYERS)
    return Llama.load(Checkpoint.open(folder), torch.float32)


@pytest.fixture(scope="module")
def traces(model: Llama) -> Traces:
    rng = np.random.default_rng(0)
    texts = Texts.of([(rng.integers(3, 259, TOKENS).tolist(), TOKENS) for _ in range(9)])
    return trace(model, texts, range(LAYERS + 1), torch.float32)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts of TOKENS, prompts of half of that."""
    for module, name, value in (
        (language_fill, "LONG_TOKENS", TOKENS),
        (language_fill, "LEAST_PROMPT", TOKENS // 2),
        (language_fill, "FOLLOWING", 8),
        (language_fill, "EXACT_FIRST", FIRST),
        (language_fill, "EXACT_LAST", EXACT),
        (language_figures, "EXACT_LAST", EXACT),
    ):
        monkeypatch.setattr(module, name, value)


def off(model: Llama, maps: Maps, traces: Traces) -> float:
    """KL divergence behind filled texts."""
    found = []
    for batch in batches(traces, 1, LAYERS, torch.Generator().manual_seed(5)):
        with torch.no_grad():
            rows_MH = read(model, maps, 1, batch.x_BTH, batch.exact).flatten(0, 1)
            own, wanted = (model.logits(rows).log_softmax(1) for rows in (rows_MH, batch.last_MH))
        found.append(float((wanted.exp() * (wanted - own)).sum(1).mean()))
    return sum(found) / len(found)


def test_the_first_layer_is_given_what_it_makes_itself(model: Llama, traces: Traces) -> None:
    tensors = fit_maps(model, traces, 1).tensors()
    bias_LO = torch.from_numpy(tensors["bias"]).float()
    weight_LOH = torch.from_numpy(unpacked(tensors, "weight")).view(*bias_LO.shape, -1)
    wanted_NO = keys_values(model.layers[1], traces.rows[1])
    found_NO = normalised(traces.rows[1].float()) @ weight_LOH[0].T + bias_LO[0]
    assert (found_NO - wanted_NO).square().mean() < 0.01 * wanted_NO.square().mean()


@pytest.mark.usefixtures("short")
def test_a_filled_text_is_read_as_the_figures_have_it(
    model: Llama, traces: Traces, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two ways to the same rows: a part of the positions here, all of them under a mask there."""
    monkeypatch.setattr(language_fill, "EXACT_FIRST", 1)
    maps = fit_maps(model, traces, 1)
    maps.weight_LOH.data = maps.stored_LOH().detach()
    fill = Fill(maps.weight_LOH.detach(), maps.bias_LO.detach(), prompts_only=True)
    first, end = traces.bounds(4)
    prompt = 25
    one = Traces(
        {1: traces.rows[1][first:end]},
        traces.top_NK[first:end],
        traces.logprobs_NK[first:end],
        traces.ids_N[first:end],
        (TOKENS,),
        (prompt,),
    )
    wanted = completed(model, one, 1, fill)
    with torch.no_grad():
        rows_TH = read(model, maps, 1, one.rows[1][None], prompt - EXACT)[0]
    logprobs_TV = model.logits(rows_TH).log_softmax(1)
    assert logprobs_TV.argmax(1).tolist() == wanted.chosen_N[prompt - EXACT :].tolist()
    next_T = logprobs_TV[:-1].gather(1, one.ids_N[prompt - EXACT + 1 :, None])[:, 0]
    torch.testing.assert_close(next_T, wanted.next_N[prompt - EXACT : -1], atol=1e-4, rtol=1e-4)


@pytest.mark.usefixtures("short")
def test_the_beginning_of_a_text_is_left_to_the_layers(model: Llama, traces: Traces) -> None:
    nothing = Maps(torch.zeros(2, 64, model.config.hidden), torch.zeros(2, 64))
    first, end = traces.bounds(2)
    rows_1TH = traces.rows[1][None, first:end]
    with torch.no_grad():
        exactly, guessed = (read(model, nothing, 1, rows_1TH, exact)[0, :1] for exact in (FIRST, FIRST + 1))
    torch.testing.assert_close(exactly, traces.rows[LAYERS][first + FIRST : first + FIRST + 1], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(guessed, traces.rows[LAYERS][first + FIRST + 1 : first + FIRST + 2], atol=1e-2)


@pytest.mark.usefixtures("short")
def test_batches_have_each_text_once_and_what_the_model_makes_of_its_end(traces: Traces) -> None:
    found = list(batches(traces, 1, LAYERS, torch.Generator().manual_seed(0)))
    firsts = [row.tolist() for batch in found for row in batch.x_BTH[:, 1]]
    assert len(found) == 4 and len({tuple(row) for row in firsts}) == 8
    for batch in found:
        _, tokens, hidden = batch.x_BTH.shape
        assert TOKENS // 2 - EXACT <= batch.exact <= TOKENS - 8 - EXACT and tokens == batch.exact + EXACT + 8
        place = int((traces.rows[1] == batch.x_BTH[0, batch.exact]).all(1).nonzero())
        assert torch.equal(batch.last_MH.view(2, -1, hidden)[0, 0], traces.rows[LAYERS][place])


def test_the_divergence_and_its_gradient_are_those_of_autograd() -> None:
    torch.manual_seed(0)
    rows_MH, teacher_MH, head_VH = torch.randn(30, 8, requires_grad=True), torch.randn(30, 8), torch.randn(50, 8)
    wanted_MV = F.linear(teacher_MH, head_VH).log_softmax(1)
    by_hand = F.kl_div(F.linear(rows_MH, head_VH).log_softmax(1), wanted_MV, reduction="batchmean", log_target=True)
    loss = Divergence.apply(rows_MH, teacher_MH, head_VH)
    torch.testing.assert_close(loss, by_hand)
    torch.testing.assert_close(*(torch.autograd.grad(3 * each, rows_MH)[0] for each in (loss, by_hand)))
    assert float(Divergence.apply(teacher_MH, teacher_MH, head_VH)) == pytest.approx(0, abs=1e-6)


@pytest.mark.usefixtures("short")
def test_distilled_maps_change_less_in_what_follows(
    model: Llama, traces: Traces, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(language_fill, "EPOCHS", 40)
    maps = fit_maps(model, traces, 1)
    before = off(model, maps, traces)
    assert 0 < off(model, train_maps(Run(tmp_path, 0), maps, model, traces, 1), traces) < 0.8 * before
