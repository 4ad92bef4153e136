"""The whole recipe of a student on a tiny model, and the model that its bundle opens as."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from isthmus.models.bundle.cli import main as bundles
from isthmus.models.errors import InvalidInput
from isthmus.models.language.checkpoint.checkpoint import Checkpoint, open_tokenizer
from isthmus.models.language.onnx.decoder import OnnxDecoder
from isthmus.models.recipes.__main__ import main
from isthmus.models.recipes.common.trainer import Run
from isthmus.models.recipes.language import prompts, student, student_bundle, student_texts
from isthmus.models.recipes.language.student import parts_of_piece

WORDS = ["split", "bridge", "river", "exit", "layer", "token", "cloud", "device"]
TOKENS = 3000


@pytest.fixture(scope="module", autouse=True)
def small() -> object:
    with pytest.MonkeyPatch.context() as patch:
        for module, name, value in (
            (student_texts, "PART_CHATS", 10),
            (student_texts, "ANSWER_TOKENS", 12),
            (student_texts, "QUESTION_TOKENS", 6),
            (student, "STEP_TOKENS", 400),
            (prompts, "ANSWER_TOKENS", 10),
            (student_bundle, "TEST_EVERY", 1),
        ):
            patch.setattr(module, name, value)
        yield


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    file.write_text("".join(json.dumps({"turns": [f"What is a {word}?"]}) + "\n" for word in WORDS))
    return file


@pytest.fixture(scope="module")
def made(folder: Path, work: Path, file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("zoo") / "student"
    student_bundle.make(out, Run(work, 0), "python -m isthmus.models.recipes student", str(folder), file, 4, TOKENS)
    return out


def test_a_students_bundle_opens_as_a_model_with_its_teachers_tokenizer(made: Path, folder: Path) -> None:
    teacher, opened = Checkpoint.open(folder), Checkpoint.open(made)
    assert opened.config.layers == 4 and opened.config.vocab == teacher.config.vocab
    assert opened.tokenizer.fingerprint == teacher.tokenizer.fingerprint == open_tokenizer(made).fingerprint
    assert opened.fingerprint == Checkpoint.open(made).fingerprint != teacher.fingerprint
