"""Outputs of the full model: those of each sequence alone, however they are batched, joined and selected."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from isthmus.models.recipes.language.corpus import Corpus
from isthmus.models.recipes.language.llama import Llama
from isthmus.models.recipes.language.teacher import TeacherOutputs, length_batches, run_teacher


def test_outputs_are_the_models_sequence_by_sequence(model: Llama, corpus: Corpus, teacher: TeacherOutputs) -> None:
    assert len(teacher) == 6 and teacher.bounds(2) == (39, 56) and teacher.answers[2] == 39 + 8
    x_BTH = model.embed(torch.from_numpy(corpus.ids_N[39:56].astype(np.int64))[None])
    for index, layer in enumerate(model.layers):
        torch.testing.assert_close(teacher.states[index][39:56], x_BTH[0].bfloat16())
        x_BTH, _ = layer(x_BTH)
    logprobs_TV = model.logits(x_BTH)[0].log_softmax(1)
    torch.testing.assert_close(teacher.logprobs_NK[39:56], logprobs_TV.topk(16).values, atol=1e-4, rtol=1e-4)
    assert torch.equal(teacher.top_NK[39:56, 0].long(), logprobs_TV.argmax(1))


def test_concatenated_outputs_keep_their_bounds(teacher: TeacherOutputs) -> None:
    both = TeacherOutputs.concatenate([teacher, teacher])
    assert len(both) == 12 and both.bounds(8) == (123 + 39, 123 + 56) and both.answers[8] == 123 + teacher.answers[2]
    assert torch.equal(both.ids_N[123:], teacher.ids_N) and both.states[1].shape[0] == 246


def test_batches_stay_small_unless_one_sequence_is_large() -> None:
    lengths = [1500, 900, 600, 3000, 10]
    batches = list(length_batches([4, 2, 1, 0, 3], lengths))
    assert [max(lengths[s] for s in batch) * len(batch) <= 2048 or len(batch) == 1 for batch in batches] == [
        True
    ] * len(batches)
    assert sorted(s for batch in batches for s in batch) == [0, 1, 2, 3, 4]


def test_one_sequence_can_be_selected(teacher: TeacherOutputs) -> None:
    one = teacher.select(2)
    assert len(one) == 1 and one.bounds(0) == (0, 17) and one.answers == (8,)
    assert torch.equal(one.ids_N, teacher.ids_N[39:56]) and torch.equal(one.states[1], teacher.states[1][39:56])
    assert torch.equal(one.top_NK, teacher.top_NK[39:56]) and torch.equal(one.logprobs_NK, teacher.logprobs_NK[39:56])


def test_first_positions_are_not_later_ones(teacher: TeacherOutputs) -> None:
    assert (~teacher.later_N).nonzero()[:, 0].tolist() == [teacher.bounds(s)[0] for s in range(len(teacher))]
    assert teacher.lengths == [9, 30, 17, 30, 12, 25]


@pytest.mark.parametrize(("answer_tokens", "found"), [(0, False), (1, False), (2, True), (5, True)])
def test_an_answer_has_two_tokens_at_least(model: Llama, answer_tokens: int, found: bool) -> None:
    corpus = Corpus.from_sequences([([5, 6, 7], 3), ([5, 6, 7, 8, 9], 5 - answer_tokens)])
    assert run_teacher(model, corpus, ()).has_answer(1) is found
