"""The upper layers on hidden states as the cloud has them: exact, coded, and with approximate KV."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from isthmus.models.language.handoff.hidden_states import StateCodec
from isthmus.models.language.packing import packed
from isthmus.models.recipes.language import suffix
from isthmus.models.recipes.language.hidden_states import fit_states, inputs_at
from isthmus.models.recipes.language.llama import Llama
from isthmus.models.recipes.language.suffix import ApproximateKV, CodedStates, next_logprobs, run_suffix
from isthmus.models.recipes.language.teacher import TeacherOutputs


def test_the_upper_layers_choose_what_the_model_chooses(model: Llama, teacher: TeacherOutputs) -> None:
    found = run_suffix(model, teacher, 1)
    assert (found.chosen_N == teacher.top_NK[:, 0]).float().mean() > 0.95, "hidden states are stored in 16 bits"


def test_approximate_kv_of_prompts_only_leaves_their_ends_exact(
    model: Llama, teacher: TeacherOutputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    outputs = 2 * model.config.kv_heads * model.config.head_dim
    wrong = ApproximateKV(torch.zeros(2, outputs, model.config.hidden), torch.zeros(2, outputs), prompts_only=True)
    exact, short = run_suffix(model, teacher, 1), run_suffix(model, teacher, 1, approximate=wrong)
    assert torch.allclose(short.next_N, exact.next_N, atol=1e-4), "no prompt is that long"
    monkeypatch.setattr(suffix, "EXACT_LAST", 5)
    found, (first, end) = run_suffix(model, teacher, 1, approximate=wrong), teacher.bounds(1)
    assert torch.equal(found.chosen_N[first], exact.chosen_N[first]), "the first position attends to itself only"
    assert not torch.allclose(found.next_N[first + 1 : end - 1], exact.next_N[first + 1 : end - 1])


def test_next_logprobs_are_of_the_token_that_follows() -> None:
    logits_TV = torch.randn(4, 7)
    found_T = next_logprobs(logits_TV, torch.tensor([1, 6, 2, 0]))
    expected = [logits_TV.log_softmax(1)[place, id_].item() for place, id_ in ((0, 6), (1, 2), (2, 0))]
    assert found_T.tolist() == pytest.approx([*expected, 0.0], abs=1e-5)


def test_offloaded_tokens_and_others_have_rates_of_their_own(model: Llama, teacher: TeacherOutputs) -> None:
    """The first hidden state of a text is not coded, and takes no byte."""
    positions_N = teacher.later_N.nonzero()[:, 0]
    states_NH = teacher.states[1][positions_N].float().numpy()
    states = fit_states(states_NH, inputs_at(model, teacher, positions_N), np.eye(states_NH.shape[1]), (20, 60))
    coded = CodedStates(model, teacher, 1, StateCodec(states, model.config.hidden, 2, 1000))
    offloaded_N = torch.arange(teacher.ends[-1]) % 3 == 0
    (mixed, mean_bytes), (low_NH, low_bytes_N), (high_NH, high_bytes_N) = (
        coded.at_rates(0, 1, offloaded_N),
        *map(coded.at_rate, (0, 1)),
    )
    first_N = ~teacher.later_N
    assert torch.equal(mixed.states[1][first_N], teacher.states[1][first_N].float())
    assert torch.equal(mixed.states[1][offloaded_N], high_NH[offloaded_N])
    assert torch.equal(mixed.states[1][~offloaded_N], low_NH[~offloaded_N])
    apart = [
        float((states_NH - teacher.states[1].float())[~first_N].square().mean()) for states_NH in (low_NH, high_NH)
    ]
    assert 0 < apart[1] < apart[0]
    assert (
        low_bytes_N[first_N.numpy()].sum()
        == high_bytes_N[first_N.numpy()].sum()
        == 0
        < low_bytes_N.sum()
        < high_bytes_N.sum()
    )
    assert mean_bytes == pytest.approx(np.where(offloaded_N.numpy(), high_bytes_N, low_bytes_N).mean())


def test_maps_are_read_from_a_bundles_tensors() -> None:
    weight_LOH = torch.randn(2, 8, 64)
    tensors = {**packed(weight_LOH.flatten(0, 1).numpy(), "weight", 8), "bias": np.ones((2, 8), np.float16)}
    maps = ApproximateKV.from_tensors(tensors)
    assert maps.weight_LOH.shape == (2, 8, 64) and maps.bias_LO.dtype == torch.float32 and not maps.prompts_only
    torch.testing.assert_close(maps.weight_LOH, weight_LOH, atol=0.05, rtol=0)
