"""The whole recipe over a tiny model and two dictionaries of a few lines, and the bundle that comes out of it."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from isthmus.models.bundle.cli import main as bundles
from isthmus.models.errors import InvalidInput
from isthmus.models.language.checkpoint.checkpoint import Checkpoint
from isthmus.models.language.handoff.bundle import HandoffBundle
from isthmus.models.language.onnx.decoder import OnnxDecoder
from isthmus.models.language.onnx.exits import ExitingDecoder
from isthmus.models.recipes.common.trainer import Run
from isthmus.models.recipes.language import bundle as language
from isthmus.models.recipes.language import evaluate as language_figures
from isthmus.models.recipes.language import exits as language_exits
from isthmus.models.recipes.language import kv_fill as language_fill
from isthmus.models.recipes.language import text as language_text
from isthmus.models.recipes.language.llama import Llama
from isthmus.models.recipes.language.text import (
    Entry,
    Texts,
    ask,
    cut,
    entries,
    generate,
    long_texts,
    parted,
    plain_texts,
    shuffled,
)
from tests.bench.tiny_llama import write_tiny_llama

WORDS = ["split", "bridge", "river", "exit", "layer", "token", "cloud", "device"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("models") / "tiny", layers=6, context=512)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With dictionaries where the packages would be unpacked."""
    work, chance = tmp_path_factory.mktemp("work"), random.Random(0)
    for package, file in (("dict-foldoc", "foldoc.dict.dz"), ("dict-jargon", "jargon.dict.dz")):
        (work / package).mkdir()
        blocks = [f"word{index}\n\n   {{{' '.join(chance.choices(WORDS, k=45))}}}" for index in range(12)]
        (work / package / file).write_bytes(gzip.compress("\n".join([*blocks, "short\n   text"]).encode()))
    return work


@pytest.fixture(scope="module")
def made(folder: Path, work: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        for module, name, value in (
            (language_text, "CHUNKS", 2),
            (language_text, "CHATS", 6),
            (language_text, "ANSWER_TOKENS", 12),
            (language_text, "QUESTION_TOKENS", 6),
            (language_text, "LONG_TOKENS", 100),
            (language_fill, "LONG_TOKENS", 100),
            (language_fill, "LEAST_PROMPT", 40),
            (language_fill, "FOLLOWING", 8),
            (language_fill, "EPOCHS", 1),
            (language_exits, "EPOCHS", 1),
            (language_figures, "ANSWER_TOKENS", 10),
            (language, "HELD_OUT", 3),
            (language, "TESTED", 1),
            (language, "FULL_PARTS", 1),
        ):
            patch.setattr(module, name, value)
        prompts = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
        prompts.write_text("".join(json.dumps({"turns": [f"What is a {word}?"]}) + "\n" for word in WORDS))
        out = tmp_path_factory.mktemp("zoo") / "tiny"
        language.make(out, Run(work, 0), "python -m isthmus.models.recipes language", str(folder), prompts)
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
    assert [copy.bits for copy in handoff.manifest.copies] == [8, 4]
    assert {"test exit0 agreement", "test rows agreement", "test point0 agreement"} <= set(handoff.manifest.scores)
    other = Checkpoint.open(write_tiny_llama(tmp_path / "other", layers=6, seed=1))
    with pytest.raises(Exception, match="belongs to the model"):
        HandoffBundle.open(made, other)


def test_it_can_be_looked_at(made: Path) -> None:
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


def test_an_exit_that_is_not_there(folder: Path, work: Path, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("CHUNKS", 2), ("CHATS", 6)):
        monkeypatch.setattr(language_text, name, value)
    monkeypatch.setattr(language, "FULL_PARTS", 1)
    with pytest.raises(InvalidInput, match=r"no exit at depth 5, exits are at \(3, 4\)"):
        language.only_exit(work, 0, str(folder), 5)


def test_exits_are_where_one_wants_them(folder: Path) -> None:
    config = Checkpoint.open(folder).config
    assert language.exit_depths(config) == (3, 4)
    assert language.exit_depths(config, (5, 2, 5)) == (2, 5)
    for chosen in ((0, 3), (6,)):
        with pytest.raises(InvalidInput, match="expected behind 1 to 5 layers"):
            language.exit_depths(config, chosen)


def test_entries_are_whole_and_long_enough(work: Path) -> None:
    found = entries(work)
    assert len(found) == 24 and found[0].title == "word0"
    assert all(set(entry.text.split()) <= set(WORDS) for entry in found)


def test_texts_are_kept_and_parted(work: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = plain_texts(entries(work), Checkpoint.open(folder).tokenizer, 0)
    texts.save(tmp_path / "t.npz")
    again = Texts.load(tmp_path / "t.npz")
    assert np.array_equal(again.ids_N, texts.ids_N) and again.ends_S[-1] == len(again.ids_N)
    monkeypatch.setattr(language_text, "PART", 10)
    parts = parted(texts)
    assert [len(part.ends_S) for part in parts] == [10, 10, 4]
    assert np.array_equal(np.concatenate([part.ids_N for part in parts]), texts.ids_N)
    assert np.array_equal(texts.answers_S, texts.ends_S), "running text has no answer"


@pytest.mark.parametrize("wanted", [10, 10_000])
def test_long_texts_are_entries_one_after_another(
    work: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, wanted: int
) -> None:
    monkeypatch.setattr(language_text, "LONG_TEXTS", wanted)
    monkeypatch.setattr(language_text, "LONG_TOKENS", 100)
    known, tokenizer = entries(work), Checkpoint.open(folder).tokenizer
    texts = long_texts(shuffled(known, tokenizer, 0))
    assert texts.ends_S.tolist() == [100 * (index + 1) for index in range(len(texts.ends_S))]
    *whole, _ = tokenizer.decode(texts.ids_N.tolist()).split("\n\n")
    assert len(texts.ends_S) == 10 if wanted == 10 else len(whole) == len(known) - 1, "all there are, but the last end"
    assert len(set(whole)) == len(whole) and set(whole) <= {f"{entry.title}\n{entry.text}" for entry in known}


def test_questions_are_of_their_entry(folder: Path) -> None:
    tokenizer, entry = Checkpoint.open(folder).tokenizer, Entry("bridge", "river " * 60)
    asked = {ask(random.Random(seed), entry, tokenizer) for seed in range(60)}
    assert len(asked) > 10 and any("bridge" in question for question in asked)
    assert all("{" not in question for question in asked)


def test_greedy_answers_are_the_models_and_end_where_they_end(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    model = Llama.load(checkpoint, torch.float32)
    decoder, prompts = OnnxDecoder(checkpoint, 64, threads=1), [[5, 6, 7], [9, 10, 11, 12, 13]]
    found = generate(model, prompts, 8, frozenset({-1}), torch.Generator(), [0.0, 0.0])
    assert [len(answer) for answer in found] == [8, 8]
    for prompt, answer in zip(prompts, found, strict=True):
        decoder.truncate(0)
        logits_V = decoder.extend([*prompt, *answer[:-1]])
        assert logits_V[answer[-1]] > logits_V.max() - 0.5, "but for 8-bit weights"
    end = found[0][2]
    assert (
        generate(model, prompts[:1], 8, frozenset({end}), torch.Generator(), [0.0])[0]
        == found[0][: found[0].index(end) + 1]
    )
    assert cut([4, 5, 6], frozenset({5})) == [4, 5] and cut([4, 5, 6], frozenset()) == [4, 5, 6]
