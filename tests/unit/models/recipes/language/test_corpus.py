"""Training texts: dictionaries, running and long texts, questions, and generated answers."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from isthmus.models.language.checkpoint.checkpoint import Checkpoint
from isthmus.models.language.onnx.decoder import OnnxDecoder
from isthmus.models.recipes.language import corpus as corpora
from isthmus.models.recipes.language.corpus import (
    Corpus,
    Entry,
    entries,
    generate,
    long_texts,
    question_about,
    running_texts,
    shuffled,
    split_parts,
    truncate_at_end,
)
from isthmus.models.recipes.language.llama import Llama

WORDS = {"split", "bridge", "river", "exit", "layer", "token", "cloud", "device"}  # of the dictionaries


def test_entries_are_whole_and_long_enough(work: Path) -> None:
    found = entries(work)
    assert len(found) == 24 and found[0].title == "word0"
    assert all(set(entry.text.split()) <= WORDS for entry in found)


def test_a_corpus_is_saved_and_split(work: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = running_texts(entries(work), Checkpoint.open(folder).tokenizer, 0)
    corpus.save(tmp_path / "t.npz")
    again = Corpus.load(tmp_path / "t.npz")
    assert np.array_equal(again.ids_N, corpus.ids_N) and again.ends_S[-1] == len(again.ids_N)
    monkeypatch.setattr(corpora, "PART_SEQUENCES", 10)
    parts = split_parts(corpus)
    assert [len(part.ends_S) for part in parts] == [10, 10, 4]
    assert np.array_equal(np.concatenate([part.ids_N for part in parts]), corpus.ids_N)
    assert np.array_equal(corpus.answers_S, corpus.ends_S), "running text has no answer"


@pytest.mark.parametrize("wanted", [10, 10_000])
def test_long_texts_are_concatenated_entries(
    work: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, wanted: int
) -> None:
    monkeypatch.setattr(corpora, "LONG_TEXTS", wanted)
    monkeypatch.setattr(corpora, "LONG_TOKENS", 100)
    known, tokenizer = entries(work), Checkpoint.open(folder).tokenizer
    corpus = long_texts(shuffled(known, tokenizer, 0))
    assert corpus.ends_S.tolist() == [100 * (index + 1) for index in range(len(corpus.ends_S))]
    *whole, _ = tokenizer.decode(corpus.ids_N.tolist()).split("\n\n")
    assert len(corpus.ends_S) == 10 if wanted == 10 else len(whole) == len(known) - 1, "all there are, but the last end"
    assert len(set(whole)) == len(whole) and set(whole) <= {f"{entry.title}\n{entry.text}" for entry in known}


def test_questions_are_of_their_entry(folder: Path) -> None:
    tokenizer, entry = Checkpoint.open(folder).tokenizer, Entry("bridge", "river " * 60)
    questions = {question_about(random.Random(seed), entry, tokenizer) for seed in range(60)}
    assert len(questions) > 10 and any("bridge" in question for question in questions)
    assert all("{" not in question for question in questions)


def test_greedily_generated_text_is_the_models_and_ends_with_an_end_token(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    model = Llama.load(checkpoint, torch.float32)
    decoder, prompts = OnnxDecoder(checkpoint, 64, threads=1), [[5, 6, 7], [9, 10, 11, 12, 13]]
    found = generate(model, prompts, 8, frozenset({-1}), torch.Generator(), [0.0, 0.0])
    assert [len(answer) for answer in found] == [8, 8]
    for prompt, answer in zip(prompts, found, strict=True):
        decoder.truncate(0)
        logits_V = decoder.extend([*prompt, *answer[:-1]])
        assert logits_V[answer[-1]] > logits_V.max() - 0.5, "up to the error of 8-bit weights"
    end = found[0][2]
    assert (
        generate(model, prompts[:1], 8, frozenset({end}), torch.Generator(), [0.0])[0]
        == found[0][: found[0].index(end) + 1]
    )
    assert truncate_at_end([4, 5, 6], frozenset({5})) == [4, 5] and truncate_at_end([4, 5, 6], frozenset()) == [4, 5, 6]
