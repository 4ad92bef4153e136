"""The whole recipe on a tiny model and two small dictionaries, and the bundle that it writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from isthmus.models.bundle.cli import main as bundles
from isthmus.models.errors import InvalidInput
from isthmus.models.language.checkpoint.checkpoint import Checkpoint
from isthmus.models.language.handoff.bundle import HandoffBundle
from isthmus.models.language.onnx.decoder import OnnxDecoder
from isthmus.models.language.onnx.exits import ExitingDecoder
from isthmus.models.recipes.common.trainer import Run
from isthmus.models.recipes.language import bundle as recipe
from isthmus.models.recipes.language import corpus, exits, kv_fill, preparation, prompts
from tests.bench.tiny_llama import write_tiny_llama

WORDS = ["split", "bridge", "river", "exit", "layer", "token", "cloud", "device"]


@pytest.fixture(scope="module")
def made(folder: Path, work: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        for module, name, value in (
            (corpus, "CHUNKS", 2),
            (corpus, "CHATS", 6),
            (corpus, "ANSWER_TOKENS", 12),
            (corpus, "QUESTION_TOKENS", 6),
            (corpus, "LONG_TOKENS", 100),
            (kv_fill, "LONG_TOKENS", 100),
            (kv_fill, "MIN_PROMPT", 40),
            (kv_fill, "FOLLOWING", 8),
            (kv_fill, "EPOCHS", 1),
            (exits, "EPOCHS", 1),
            (prompts, "ANSWER_TOKENS", 10),
            (preparation, "HELD_OUT", 3),
            (preparation, "FULL_PARTS", 1),
            (recipe, "HELD_OUT", 3),
            (recipe, "TEST_EVERY", 1),
        ):
            patch.setattr(module, name, value)
        file = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
        file.write_text("".join(json.dumps({"turns": [f"What is a {word}?"]}) + "\n" for word in WORDS))
        out = tmp_path_factory.mktemp("zoo") / "tiny"
        recipe.make(out, Run(work, 0), "python -m isthmus.models.recipes language", str(folder), file)
    return out


def test_the_bundle_serves_its_model_and_no_other(made: Path, folder: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    handoff = HandoffBundle.open(made, checkpoint)
    assert (
        handoff.depths == (3, 4)
        and handoff.depth == 4
        and len(handoff.manifest.rates) == len(handoff.state_codec.rates)
    )
    weight_LOH, bias_LO = handoff.kv_fill()
    assert weight_LOH.shape == (2, 64, 64) and bias_LO.shape == (2, 64)
    decoder = OnnxDecoder(checkpoint, 64, threads=1, cuts=handoff.depths)
    choice = ExitingDecoder(handoff, checkpoint, decoder, 1).choose([5, 6, 7], 2.0)
    assert choice.exit == 1 and 0 <= choice.likely <= 1
    assert handoff.manifest.training.command == "python -m isthmus.models.recipes language"
    assert {"test exit0 agreement", "test rows agreement", "test point0 agreement"} <= set(handoff.manifest.scores)
    other = Checkpoint.open(write_tiny_llama(tmp_path / "other", layers=6, seed=1))
    with pytest.raises(Exception, match="belongs to the model"):
        HandoffBundle.open(made, other)


def test_it_can_be_inspected_and_verified(made: Path) -> None:
    shown = CliRunner().invoke(bundles, ["inspect", str(made)])
    assert (
        shown.exit_code == 0
        and "exit after 3 layers" in shown.output
        and "rate 0:" in shown.output
        and "point 0:" in shown.output
    )
    as_json = json.loads(CliRunner().invoke(bundles, ["inspect", "--json", str(made)]).output)
    assert as_json == json.loads((made / "manifest.json").read_text())
    assert CliRunner().invoke(bundles, ["verify", str(made)]).output.startswith("ok:")
    (made / "fill.safetensors").write_bytes(b"")
    broken = CliRunner().invoke(bundles, ["verify", str(made)])
    assert broken.exit_code == 1 and "fill.safetensors" in broken.output


def test_an_unknown_exit_is_refused(folder: Path, work: Path, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("CHUNKS", 2), ("CHATS", 6)):
        monkeypatch.setattr(corpus, name, value)
    monkeypatch.setattr(preparation, "FULL_PARTS", 1)
    with pytest.raises(InvalidInput, match=r"no exit at depth 5, exits are at \(3, 4\)"):
        recipe.only_exit(Run(work, 0), str(folder), 5)


@pytest.mark.parametrize(
    ("source", "model", "name"),
    [
        ("smollm2", "whatever", "smollm2"),
        ("/models/My Model", "My Model (v2)", "my-model--v2-"),
        ("x", "a" * 99, "a" * 60),
    ],
)
def test_a_bundle_is_named_after_its_model(source: str, model: str, name: str) -> None:
    assert recipe.bundle_name(source, model) == name
