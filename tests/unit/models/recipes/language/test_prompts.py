"""Test prompts from a file, and cached greedy answers to them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from isthmus.models.errors import InvalidInput
from isthmus.models.language.checkpoint.checkpoint import Checkpoint
from isthmus.models.recipes.language import prompts
from isthmus.models.recipes.language.llama import Llama
from isthmus.models.recipes.language.prompts import greedy_answers, load_prompts


@pytest.fixture
def file(tmp_path: Path) -> Path:
    lines = [json.dumps({"turns": ["x" * length, "a second turn"]}) for length in (30, 10, 900, 20)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path / "prompts.jsonl"


def test_prompts_are_sorted_and_long_ones_left_out(folder: Path, file: Path) -> None:
    tokenizer = Checkpoint.open(folder).tokenizer
    found = load_prompts(file, tokenizer)
    assert [tokenizer.decode(ids).count("x") for ids in found] == [10, 20, 30]
    assert load_prompts(file, tokenizer, every=2) == found[::2]


@pytest.mark.parametrize(
    "content", ["", "{", '{"turns": []}', '{"prompt": "x"}', "[1]", json.dumps({"turns": ["x" * 900]})]
)
def test_a_file_without_prompts_is_refused(folder: Path, tmp_path: Path, content: str) -> None:
    (tmp_path / "bad.jsonl").write_text(content)
    with pytest.raises(InvalidInput, match=r"bad\.jsonl"):
        load_prompts(tmp_path / "bad.jsonl", Checkpoint.open(folder).tokenizer)


def test_answers_are_generated_once(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "ANSWER_TOKENS", 6)
    monkeypatch.setattr(prompts, "BATCH_PROMPTS", 2)
    model, texts = Llama.load(Checkpoint.open(folder), torch.float32), [[5, 6], [7, 8, 9], [10]]
    name, corpus = greedy_answers(tmp_path, model, frozenset({-1}), texts)
    assert corpus.ends_S.tolist() == [8, 17, 24] and corpus.answers_S.tolist() == [2, 11, 18]
    assert [ids[: len(text)] for ids, text in zip(corpus.sequences(), texts, strict=True)] == texts
    assert [path.name for path in tmp_path.iterdir()] == [f"{name}.npz"]
    monkeypatch.setattr(prompts, "generate", None)
    again_name, again = greedy_answers(tmp_path, model, frozenset({-1}), texts)
    assert again_name == name and np.array_equal(again.ids_N, corpus.ids_N)
    with pytest.raises(TypeError):
        greedy_answers(tmp_path, model, frozenset({-1}), [[5, 7]])
