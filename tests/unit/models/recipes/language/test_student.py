"""The whole recipe of a student on a tiny model, and the model that its bundle opens as."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from isthmus.models.bundle.cli import main as bundles
from isthmus.models.errors import InvalidInput
from isthmus.models.language.checkpoint.bundle import BundleWeights, stored_tensors
from isthmus.models.language.checkpoint.checkpoint import Checkpoint, open_tokenizer
from isthmus.models.language.onnx.decoder import OnnxDecoder
from isthmus.models.recipes.__main__ import main
from isthmus.models.recipes.common.trainer import Run
from isthmus.models.recipes.language import prompts, student, student_bundle, student_texts
from isthmus.models.recipes.language.student import Student, parts_of_piece, rounded
from tests.bench.tiny_llama import write_tiny_llama

WORDS = ["split", "bridge", "river", "exit", "layer", "token", "cloud", "device"]
SMALL = (
    (student_texts, "PART_CHATS", 4),
    (student_texts, "ANSWER_TOKENS", 8),
    (student_texts, "QUESTION_TOKENS", 4),
    (student, "STEP_TOKENS", 600),
    (student, "NEW_PARTS", 1),
    (student, "REPLAYED", 1),
    (student_bundle, "NEW_PARTS", 1),
    (student_bundle, "REPLAYED", 1),
    (student_bundle, "TEST_EVERY", 1),
    (prompts, "ANSWER_TOKENS", 6),
)


@pytest.fixture(scope="module", autouse=True)
def small() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for module, name, value in SMALL:
            patch.setattr(module, name, value)
        yield


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    file.write_text("".join(json.dumps({"turns": [f"What is a {word}?"]}) + "\n" for word in WORDS))
    return file


def make(out: Path, run: Run, teacher: Path, file: Path, tokens: int, *, train: bool = True) -> Path:
    student_bundle.make(
        out, run, "python -m isthmus.models.recipes student", str(teacher), file, 4, tokens, train=train
    )
    return out


@pytest.fixture(scope="module")
def made(folder: Path, work: Path, file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("zoo") / "student", Run(work, 0), folder, file, 1)


def test_a_students_bundle_opens_as_a_model_with_its_teachers_tokenizer(made: Path, folder: Path) -> None:
    teacher, opened = Checkpoint.open(folder), Checkpoint.open(made)
    assert opened.config.layers == 4 and opened.config.vocab == teacher.config.vocab
    assert opened.tokenizer.fingerprint == teacher.tokenizer.fingerprint == open_tokenizer(made).fingerprint
    assert np.isfinite(OnnxDecoder(opened, 16, 4, 1).extend([5, 6, 7])).all()
    result = CliRunner().invoke(bundles, ["inspect", str(made)])
    assert result.exit_code == 0, result.output
    assert "student: 4 layers, 64 hidden values, 259 tokens, 4-bit weights" in result.output
    assert f"layers 0, 1, 4, 5 of the model {teacher.fingerprint.hex()[:12]}" in result.output
    assert "agreement" in result.output
    assert CliRunner().invoke(bundles, ["verify", str(made)]).exit_code == 0


def test_more_tokens_go_on_with_a_finished_run(
    made: Path, folder: Path, work: Path, file: Path, tmp_path: Path
) -> None:
    run = Run(work, 0)
    again = make(tmp_path / "again", run, folder, file, 1)
    assert (again / "weights.safetensors").read_bytes() == (made / "weights.safetensors").read_bytes()
    assert len(run.logged()) == 1
    longer = make(tmp_path / "longer", run, folder, file, 6 * student_texts.load_part(work, 0).ends[-1])
    assert [line["epoch"] for line in run.logged()] == [0, 1, 2]
    assert (longer / "weights.safetensors").read_bytes() != (made / "weights.safetensors").read_bytes()
    as_it_is = make(tmp_path / "as-it-is", run, folder, file, 1, train=False)
    assert (as_it_is / "weights.safetensors").read_bytes() == (longer / "weights.safetensors").read_bytes()


def test_what_is_not_there_or_impossible_is_one_line(folder: Path, work: Path, file: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="nothing is trained yet"):
        run = Run(work, 0)
        student_bundle.make(tmp_path / "b", run, "", str(folder), file, 5, 1, train=False)
    options = ["student", "--teacher", str(folder), "--prompts", str(file), "--out", str(tmp_path / "b")]
    result = CliRunner().invoke(main, [*options, "--layers", "6", "--work", str(work)])
    assert result.exit_code == 1 and "a student of 6 layers, expected 4 to 5" in result.output
    assert not (tmp_path / "b").exists()


def test_untied_heads_biases_and_norms(work: Path, file: Path, tmp_path: Path) -> None:
    teacher = write_tiny_llama(tmp_path / "qwen", "qwen2", layers=5, tied=False)
    for name in ("dict-foldoc", "dict-jargon"):
        (tmp_path / "work" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "work" / name).symlink_to(work / name)
    opened = Checkpoint.open(make(tmp_path / "student", Run(tmp_path / "work", 0), teacher, file, 1))
    assert opened.config.qkv_bias and not opened.config.tied
    assert opened.blocks("lm_head.weight") is not None


def test_training_sees_the_weights_that_are_stored() -> None:
    weight_OI = torch.randn(5, 128, generator=torch.Generator().manual_seed(0))
    weight_OI[2, :64] = 0
    weights = BundleWeights(stored_tensors({"a": weight_OI.numpy()}))
    np.testing.assert_array_equal(rounded(weight_OI).numpy(), weights.tensor("a"))


def test_the_gradient_passes_through_rounding(folder: Path) -> None:
    config = Checkpoint.open(folder).config
    torch.manual_seed(0)
    tiny = Student(config, torch.randn(config.vocab, config.hidden))
    tiny(torch.tensor([[5, 6, 7]]))[0, -1].sum().backward()
    matrices = [parameter for parameter in tiny.parameters() if parameter.ndim == 2]
    assert matrices and all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in matrices)


def test_pieces_read_new_texts_and_replay_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(student, "NEW_PARTS", 2)
    monkeypatch.setattr(student, "REPLAYED", 3)
    assert parts_of_piece(0) == [0, 1] and set(parts_of_piece(1)) == {0, 1, 2, 3}
    later = parts_of_piece(9)
    assert later[:2] == [18, 19] and len(set(later)) == 5 and max(later[2:]) < 18 and later == parts_of_piece(9)
