"""Generated chats: their likely tokens are those of a pass over the finished texts, whatever the batch."""

from __future__ import annotations

import random

import pytest
import torch

from isthmus.models.recipes.language import student_texts
from isthmus.models.recipes.language.corpus import Corpus, generate
from isthmus.models.recipes.language.llama import Llama
from isthmus.models.recipes.language.student_texts import answer, as_outputs, prompt_batches
from isthmus.models.recipes.language.teacher import run_teacher

PROMPTS = [[5, 6, 7, 8], [9, 10, 11, 12, 13, 14, 15], [20, 21, 22, 23, 24]]
NO_END = frozenset({0})


def test_greedy_answers_are_those_of_a_plain_decoder(model: Llama) -> None:
    found = answer(model, PROMPTS, 12, NO_END, torch.Generator().manual_seed(0), [0.0] * 3, 2)
    plain = generate(model, PROMPTS, 12, NO_END, torch.Generator().manual_seed(0), [0.0] * 3)
    assert [each.ids[each.prompt :] for each in found] == plain
    assert [each.ids[: each.prompt] for each in found] == PROMPTS


def test_sequences_that_end_leave_and_change_nothing(model: Llama) -> None:
    generator = torch.Generator().manual_seed(0)
    whole = answer(model, PROMPTS, 12, NO_END, generator, [0.0] * 3, 2)
    ends = frozenset({whole[1].ids[whole[1].prompt + 1]})
    for each, before in zip(answer(model, PROMPTS, 12, ends, generator, [0.0] * 3, 2), whole, strict=True):
        ids = before.ids[before.prompt :]
        stop = next((index + 1 for index, id_ in enumerate(ids) if id_ in ends), len(ids))
        assert each.ids[each.prompt :] == ids[:stop]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_likely_tokens_are_those_of_a_pass_over_the_text(model: Llama, temperature: float) -> None:
    generator = torch.Generator().manual_seed(0)
    outputs = as_outputs(answer(model, PROMPTS, 12, NO_END, generator, [temperature] * 3, 2))
    sequences = [outputs.select(s) for s in range(len(outputs))]
    texts = Corpus.from_sequences([(each.ids_N.tolist(), each.answers[0]) for each in sequences])
    expected = run_teacher(model, texts, ())
    known_N = outputs.logprobs_NK[:, 0].isfinite()
    starts = [0, *outputs.ends[:-1]]
    unknown = [*starts, *(start + 1 for start in starts), *(end - 1 for end in outputs.ends)]
    assert sorted((~known_N).nonzero()[:, 0].tolist()) == sorted(unknown)
    torch.testing.assert_close(
        outputs.logprobs_NK[known_N].float(), expected.logprobs_NK[known_N], rtol=1e-2, atol=2e-2
    )
    assert (outputs.top_NK[known_N, 0] == expected.top_NK[known_N, 0]).float().mean() > 0.98


def test_batches_hold_what_the_caches_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(student_texts, "ANSWER_TOKENS", 10)
    monkeypatch.setattr(student_texts, "BATCH_TOKENS", 60)
    chance = random.Random(0)
    lengths = sorted(chance.randint(1, 90) for _ in range(30))
    groups = list(prompt_batches([[1] * length for length in lengths]))
    assert [len(prompt) for group in groups for prompt in group] == lengths
    assert all(len(group) == 1 or len(group) * (len(group[-1]) + 10) <= 60 for group in groups)
