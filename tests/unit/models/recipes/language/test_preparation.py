"""Depths of exits, models that are refused, and outputs of the full model that are computed once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from isthmus.models.errors import InvalidInput
from isthmus.models.language.checkpoint.checkpoint import Checkpoint
from isthmus.models.recipes.common.trainer import Run
from isthmus.models.recipes.language import preparation
from isthmus.models.recipes.language.corpus import Corpus
from isthmus.models.recipes.language.llama import Llama
from isthmus.models.recipes.language.preparation import Prepared, exit_depths, open_checkpoint, teacher_outputs
from tests.bench.tiny_llama import write_tiny_llama

NAMED = {
    "one": Corpus.from_sequences([([5, 6, 7, 8], 2), ([9, 10, 11], 3)]),
    "two": Corpus.from_sequences([([12, 13, 14, 15], 1)]),
}


def test_depths_of_exits(folder: Path) -> None:
    config = Checkpoint.open(folder).config
    assert exit_depths(config) == (3, 4)
    assert exit_depths(config, (5, 2, 5)) == (2, 5)
    for chosen in ((0, 3), (6,)):
        with pytest.raises(InvalidInput, match="expected 1 to 5 layers"):
            exit_depths(config, chosen)


def test_a_model_with_an_output_head_of_its_own_is_refused(folder: Path, tmp_path: Path) -> None:
    assert open_checkpoint(str(folder)).config.tied
    with pytest.raises(InvalidInput, match="not tied to the embedding"):
        open_checkpoint(str(write_tiny_llama(tmp_path / "untied", tied=False)))


def test_teacher_outputs_are_computed_once(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, run = Llama.load(Checkpoint.open(folder), torch.float32), Run(tmp_path, 0)
    first = teacher_outputs(run, model, NAMED, (0, 2))
    assert len(first) == 3 and first.ends == (4, 7, 11) and first.answers == (2, 7, 8)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["teacher-one-0-2.pt", "teacher-two-0-2.pt"]
    monkeypatch.setattr(preparation, "run_teacher", None)
    again = teacher_outputs(run, model, NAMED, (0, 2))
    assert torch.equal(again.states[2], first.states[2]) and torch.equal(again.top_NK, first.top_NK)


def test_sequences_are_held_out(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparation, "HELD_OUT", 2)
    checkpoint = Checkpoint.open(folder)
    model, run = Llama.load(checkpoint, torch.float32), Run(tmp_path, 0)
    teacher = teacher_outputs(run, model, NAMED, (3, 4))
    prepared = Prepared(run, checkpoint, model, (3, 4), teacher, teacher)
    assert prepared.depth == 4 and list(prepared.held_out) == [0, 2]
    assert prepared.answers(held_out=True) == [0, 2]
    assert prepared.answers(held_out=False) == [], "the only other sequence has no answer"
