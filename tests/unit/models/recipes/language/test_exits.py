from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from isthmus.models.language.checkpoint.checkpoint import Checkpoint
from isthmus.models.language.handoff.hidden_states import StateCodec
from isthmus.models.language.torch.kv_fill import normalised
from isthmus.models.recipes.language import evaluate as language_figures
from isthmus.models.recipes.language.confidence_head import decided, judged, train_judge
from isthmus.models.recipes.language.evaluate import Crossing, Fill, completed, next_logprobs
from isthmus.models.recipes.language.exits import Exit, HeadLoss, Traces, batches, drawn, grouped, start, trace
from isthmus.models.recipes.language.hidden_states import fit_states, token_pairs
from isthmus.models.recipes.language.llama import Llama
from isthmus.models.recipes.language.text import Texts
from tests.bench.tiny_llama import write_tiny_llama

LAYERS = 3


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Llama:
    folder = write_tiny_llama(tmp_path_factory.mktemp("models") / "tiny", layers=LAYERS)
    return Llama.load(Checkpoint.open(folder), torch.float32)


@pytest.fixture(scope="module")
def texts() -> Texts:
    rng = np.random.default_rng(0)
    return Texts.of([(rng.integers(3, 259, length).tolist(), length // 2) for length in (9, 30, 17, 30, 12, 25)])


@pytest.fixture(scope="module")
def traces(model: Llama, texts: Texts) -> Traces:
    return trace(model, texts, range(LAYERS + 1))


def cross_entropy(rows_MH: Tensor, head_VH: Tensor, top_MK: Tensor, weight_MK: Tensor) -> tuple[Tensor, Tensor]:
    """Of all logits, by autograd; and its gradient."""
    loss = -(weight_MK * F.linear(rows_MH, head_VH).log_softmax(1).gather(1, top_MK)).sum(1).mean()
    return loss, torch.autograd.grad(loss, rows_MH)[0]


@pytest.fixture
def answers() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows, an output head, the likeliest tokens and their likelihoods."""
    torch.manual_seed(0)
    rows_MH, head_VH = torch.randn(700, 32, requires_grad=True), 0.3 * torch.randn(1000, 32)
    top_MK = torch.stack([torch.randperm(300)[:16] for _ in range(700)])
    weight_MK = torch.rand(700, 16)
    return rows_MH, head_VH, top_MK, weight_MK / (1.2 * weight_MK.sum(1, keepdim=True))  # the likeliest are not all


def test_with_all_of_the_vocabulary_the_loss_is_the_cross_entropy_and_so_is_its_gradient(
    answers: tuple[Tensor, Tensor, Tensor, Tensor],
) -> None:
    rows_MH, head_VH, top_MK, weight_MK = answers
    wanted, gradient_MH = cross_entropy(*answers)
    part = drawn(top_MK, 1000, 1000)
    assert sorted(part.ids_V.tolist()) == list(range(1000)) and not part.shift_V.any()
    found = HeadLoss.apply(rows_MH, head_VH[part.ids_V], part.shift_V, part.top_MK, weight_MK)  # type: ignore[no-untyped-call]
    (3 * found).backward()
    torch.testing.assert_close(found, wanted)
    assert rows_MH.grad is not None
    torch.testing.assert_close(rows_MH.grad, 3 * gradient_MH, atol=1e-7, rtol=1e-4)


def test_part_of_the_vocabulary_stands_for_all_of_it(answers: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    rows_MH, head_VH, top_MK, weight_MK = answers
    wanted, gradient_MH = cross_entropy(*answers)
    losses, gradients = [], []
    for _ in range(20):
        part = drawn(top_MK, 1000, 200)
        assert len(part.ids_V) == len(part.ids_V.unique()) == 500 and torch.equal(part.ids_V[part.top_MK], top_MK)
        rows_MH.grad = None
        loss = HeadLoss.apply(rows_MH, head_VH[part.ids_V], part.shift_V, part.top_MK, weight_MK)  # type: ignore[no-untyped-call]
        loss.backward()
        assert rows_MH.grad is not None
        losses.append(loss.item())
        gradients.append(rows_MH.grad)
    assert sum(losses) / 20 == pytest.approx(wanted.item(), rel=0.01)
    assert F.cosine_similarity(torch.stack(gradients).mean(0), gradient_MH, dim=1).mean() > 0.99


def test_traces_are_the_model_sequence_by_sequence(model: Llama, texts: Texts, traces: Traces) -> None:
    assert len(traces) == 6 and traces.bounds(2) == (39, 56) and traces.answers[2] == 39 + 8
    x_BTH = model.embed(torch.from_numpy(texts.ids_N[39:56].astype(np.int64))[None])
    for index, layer in enumerate(model.layers):
        torch.testing.assert_close(traces.rows[index][39:56], x_BTH[0].bfloat16())
        x_BTH, _ = layer(x_BTH)
    logprobs_TV = model.logits(x_BTH)[0].log_softmax(1)
    torch.testing.assert_close(traces.logprobs_NK[39:56], logprobs_TV.topk(16).values, atol=1e-4, rtol=1e-4)
    assert torch.equal(traces.top_NK[39:56, 0].long(), logprobs_TV.argmax(1))


def test_joined_traces_keep_their_bounds(traces: Traces) -> None:
    both = Traces.joined([traces, traces])
    assert len(both) == 12 and both.bounds(8) == (123 + 39, 123 + 56) and both.answers[8] == 123 + traces.answers[2]
    assert torch.equal(both.ids_N[123:], traces.ids_N) and both.rows[1].shape[0] == 246


def test_batches_hold_each_chosen_token_once(traces: Traces) -> None:
    chosen = [0, 2, 3, 5]
    found = list(batches(traces, 1, chosen, torch.Generator().manual_seed(0)))
    places = sorted(torch.cat([batch.places_M for batch in found]).tolist())
    assert places == [place for s in chosen for place in range(*traces.bounds(s))]
    for batch in found:
        torch.testing.assert_close(batch.x_BTH[batch.real_BT], traces.rows[1][batch.places_M].float())


def test_packs_stay_small_unless_one_is_large() -> None:
    lengths = [1500, 900, 600, 3000, 10]
    packs = list(grouped([4, 2, 1, 0, 3], lengths))
    assert [max(lengths[s] for s in pack) * len(pack) <= 2048 or len(pack) == 1 for pack in packs] == [True] * len(
        packs
    )
    assert sorted(s for pack in packs for s in pack) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("count", [1, 2])
def test_an_exit_before_the_last_layers_starts_as_the_model(model: Llama, traces: Traces, count: int) -> None:
    """Its map is then the regression of the rows on themselves."""
    exit_ = Exit(model.config, LAYERS - count, count)
    start(exit_, model, traces)
    first, last = traces.bounds(3)
    with torch.no_grad():
        logits_TV = F.linear(exit_(traces.rows[LAYERS - count][None, first:last].float())[0], model.embedding_VH)
    assert (logits_TV.argmax(1) == traces.top_NK[first:last, 0]).float().mean() > 0.7


def test_layers_behind_complete_what_the_model_says(model: Llama, traces: Traces) -> None:
    found = completed(model, traces, 1)
    assert (found.chosen_N == traces.top_NK[:, 0]).float().mean() > 0.95, "rows are kept in 16 bits"


def test_a_fill_of_nothing_but_prompts_leaves_their_ends_to_the_layers(
    model: Llama, traces: Traces, monkeypatch: pytest.MonkeyPatch
) -> None:
    outputs = 2 * model.config.kv_heads * model.config.head_dim
    wrong = Fill(torch.zeros(2, outputs, model.config.hidden), torch.zeros(2, outputs), prompts_only=True)
    exact, spared = completed(model, traces, 1), completed(model, traces, 1, fill=wrong)
    assert torch.allclose(spared.next_N, exact.next_N, atol=1e-4), "no prompt is so long"
    monkeypatch.setattr(language_figures, "EXACT_LAST", 5)
    found, (first, end) = completed(model, traces, 1, fill=wrong), traces.bounds(1)
    assert torch.equal(found.chosen_N[first], exact.chosen_N[first]), "the first position reads itself alone"
    assert not torch.allclose(found.next_N[first + 1 : end - 1], exact.next_N[first + 1 : end - 1])


def test_next_logprobs_are_of_the_token_that_follows() -> None:
    logits_TV = torch.randn(4, 7)
    found_T = next_logprobs(logits_TV, torch.tensor([1, 6, 2, 0]))
    wanted = [logits_TV.log_softmax(1)[place, id_].item() for place, id_ in ((0, 6), (1, 2), (2, 0))]
    assert found_T.tolist() == pytest.approx([*wanted, 0.0], abs=1e-5)


def test_rows_are_normalised_by_their_root_mean_square() -> None:
    assert normalised(torch.tensor([[3.0, 4.0, 0.0, 0.0]])).square().mean().item() == pytest.approx(1, abs=1e-5)


def test_a_judge_learns_what_can_be_known() -> None:
    torch.manual_seed(0)
    seen_NF = 5 + 3 * torch.randn(6000, 6)
    chance_N = torch.sigmoid(2 * (seen_NF[:, 2] - 5) / 3)
    right_N = torch.rand(6000) < chance_N
    likely_N = judged(train_judge(seen_NF, right_N, 0), 5 + 3 * torch.randn(4, 6).index_fill(1, torch.tensor([2]), 0.0))
    assert likely_N.shape == (4,)
    likely_N = judged(train_judge(seen_NF, right_N, 0), seen_NF)
    assert (likely_N - chance_N).abs().mean() < 0.06


def test_the_first_sure_exit_decides() -> None:
    likely_EN = torch.tensor([[0.9, 0.2, 0.1, 0.9], [0.1, 0.8, 0.3, 0.95]])
    right_EN = torch.tensor([[True, False, False, False], [False, True, True, True]])
    found = decided(likely_EN, right_EN, 0.7)
    assert found.sure_N.tolist() == [True, True, False, True] and found.right_N[found.sure_N].tolist() == [
        True,
        True,
        False,
    ]
    assert (found.coverage, found.agreement) == (0.75, pytest.approx(2 / 3))
    assert decided(likely_EN, right_EN, 1.0).agreement == 1.0
    some = found.at(torch.tensor([False, True, True, False]))
    assert (some.sure_N.tolist(), some.exit_N.tolist(), some.coverage, some.agreement) == (
        [True, False],
        [1, 0],
        0.5,
        1.0,
    )


def test_rows_cross_at_the_rate_that_they_are_wanted_at(model: Llama, traces: Traces) -> None:
    """Those that decide at one rate, others at another; the first of a text as it was, and without a byte."""
    places_N = traces.later_N.nonzero()[:, 0]
    rows_NH = traces.rows[1][places_N].float().numpy()
    states = fit_states(rows_NH, token_pairs(model, traces, places_N), np.eye(rows_NH.shape[1]), (20, 60))
    crossing = Crossing(model, traces, 1, StateCodec(states, model.config.hidden, 2, 1000))
    asked_N = torch.arange(traces.ends[-1]) % 3 == 0
    (mixed, mean_bytes), (low_NH, cheap_N), (high_NH, dear_N) = crossing.at(0, 1, asked_N), *map(crossing.coded, (0, 1))
    first_N = ~traces.later_N
    assert torch.equal(mixed.rows[1][first_N], traces.rows[1][first_N].float())
    assert torch.equal(mixed.rows[1][asked_N], high_NH[asked_N])
    assert torch.equal(mixed.rows[1][~asked_N], low_NH[~asked_N])
    apart = [float((rows_NH - traces.rows[1].float())[~first_N].square().mean()) for rows_NH in (low_NH, high_NH)]
    assert 0 < apart[1] < apart[0]
    assert cheap_N[first_N.numpy()].sum() == dear_N[first_N.numpy()].sum() == 0 < cheap_N.sum() < dear_N.sum()
    assert mean_bytes == pytest.approx(np.where(asked_N.numpy(), dear_N, cheap_N).mean())
