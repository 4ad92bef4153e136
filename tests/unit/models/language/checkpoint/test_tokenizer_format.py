"""A tokenizer as bytes: every kind survives unchanged, and the bytes are what identifies it."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from isthmus.models.errors import BundleError, InvalidInput
from isthmus.models.language.checkpoint import gguf_tokenizer
from isthmus.models.language.checkpoint.chat_template import ChatTemplate
from isthmus.models.language.checkpoint.checkpoint import open_tokenizer
from isthmus.models.language.checkpoint.tokenizer import Message, Tokenizer
from isthmus.models.messages import Sampling
from tests.bench.tiny_llama import byte_tokenizer, write_tiny_gguf, write_tiny_llama
from tests.bench.tiny_sentencepiece import (
    gguf_fields,
    sentencepiece_model,
    tiny_pieces,
    tokenizer_json,
    write_tokenizer,
)

TALK = [Message("user", "What is 2 + 2?"), Message("assistant", "4 🎉"), Message("user", "  Why?\n")]
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
KINDS = (
    "byte-level GGUF",
    "byte-level folder",
    "SentencePiece GGUF",
    "BPE folder",
    "tokenizer.model",
    "unigram",
    "unigram model",
)


def unused_token() -> dict[str, Any]:
    return gguf_fields(
        token_type=[2, 3, 3, 5, *([6] * 255), *([1] * (len(gguf_fields()["tokenizer.ggml.tokens"]) - 259))]
    )


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    """A tokenizer from each kind of file that is read."""
    llama, bpe, legacy, unigram, legacy_unigram = (tmp_path_factory.mktemp("folder") for _ in range(5))
    write_tiny_llama(llama)
    (llama / "generation_config.json").write_text('{"eos_token_id": [5, 2], "temperature": 0.6, "top_p": 0.95}')
    tokenizer_json(unigram=True).save(str(unigram / "tokenizer.json"))
    rng, pieces = random.Random(0), tiny_pieces()
    scored = replace(pieces, scores=[-rng.random() * 20 for _ in pieces.scores], unigram=True)
    (legacy_unigram / "tokenizer.model").write_bytes(sentencepiece_model(scored))
    found = (
        open_tokenizer("smollm2"),
        open_tokenizer(llama),
        gguf_tokenizer.read(unused_token()),
        open_tokenizer(write_tokenizer(bpe, "tokenizer.json")),
        open_tokenizer(write_tokenizer(legacy, "tokenizer.model")),
        open_tokenizer(unigram),
        open_tokenizer(legacy_unigram),
    )
    return dict(zip(KINDS, found, strict=True))


@pytest.fixture(scope="module")
def copies(kinds: dict[str, Tokenizer]) -> dict[str, Tokenizer]:
    return {kind: Tokenizer.from_bytes(original.to_bytes()) for kind, original in kinds.items()}


def same(one: Tokenizer, other: Tokenizer) -> None:
    """Every attribute that does not depend on a text."""
    for name in ("fingerprint", "vocabulary", "size", "eos_ids", "sampling", "leading_spaces", "has_template"):
        assert getattr(one, name) == getattr(other, name), name
    assert [(one.special(id), one.token_bytes(id)) for id in range(one.size)] == [
        (other.special(id), other.token_bytes(id)) for id in range(other.size)
    ]
    if one.has_template:
        assert one.chat(TALK) == other.chat(TALK)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_survives(kinds: dict[str, Tokenizer], kind: str) -> None:
    original = kinds[kind]
    raw = original.to_bytes()
    again = Tokenizer.from_bytes(raw)
    same(original, again)
    assert again.to_bytes() == original.to_bytes() == raw
    assert original.fingerprint == hashlib.sha256(raw).digest()


@given(text=st.text(max_size=80), special=st.booleans())
def test_any_text_has_the_same_ids(
    kinds: dict[str, Tokenizer], copies: dict[str, Tokenizer], text: str, special: bool
) -> None:
    for kind, original in kinds.items():
        again = copies[kind]
        ids = original.encode(text, special=special)
        assert again.encode(text, special=special) == ids, kind
        assert again.decode(ids) == original.decode(ids), kind


def test_scores_keep_their_last_digit(kinds: dict[str, Tokenizer]) -> None:
    """The library's parser changes one in eight; `from_bytes` reads them as written."""
    raw = kinds["unigram model"].to_bytes()
    text = raw.partition(b"\n")[2].decode()
    assert tokenizers.Tokenizer.from_str(text).to_str() != text
    assert Tokenizer.from_bytes(raw).to_bytes() == raw


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return write_tiny_llama(tmp_path / "tiny")


def test_golden(golden: Callable[[str, bytes], None]) -> None:
    tokenizer = Tokenizer(
        byte_tokenizer(),
        merges=["a b"],
        eos_ids=[2, 0],
        template=ChatTemplate("{{ bos_token }}{{ messages[0].content }} é", {"bos_token": "<|im_start|>"}),
        bos=[1],
        unused=[258],
        sampling=Sampling(0.5, 0.25),
    )
    golden("tokenizer_v1.jsonl", tokenizer.to_bytes())


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("tokenizer_config.json", {"chat_template": "other"}),
        ("tokenizer_config.json", {"eos_token": "a"}),
        ("tokenizer_config.json", {"add_bos_token": True}),
        ("tokenizer_config.json", {"bos_token": "a"}),  # which the template names
        ("tokenizer.json", {"pre_tokenizer": {**BYTE_LEVEL, "add_prefix_space": True}}),
        ("generation_config.json", {"temperature": 0.5}),
    ],
)
def test_fingerprint_follows_all_of_it(tiny: Path, name: str, changes: dict[str, Any]) -> None:
    original = Tokenizer.open(tiny)
    content = json.loads((tiny / name).read_text()) if (tiny / name).exists() else {}
    (tiny / name).write_text(json.dumps({**content, **changes}))
    changed = Tokenizer.open(tiny)
    assert changed.fingerprint != original.fingerprint and changed.vocabulary == original.vocabulary


def test_a_folder_without_weights(tiny: Path) -> None:
    whole = Tokenizer.open(tiny)
    for name in ("model.safetensors", "config.json"):
        (tiny / name).unlink()
    assert open_tokenizer(tiny).to_bytes() == whole.to_bytes()
    with pytest.raises(BundleError, match=r"tokenizer\.json: no such file in tiny"):
        (tiny / "tokenizer.json").unlink()
        open_tokenizer(tiny)


def test_a_header_of_gguf(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "tiny.gguf", write_tiny_llama(tmp_path / "tiny", vocab="bytes"))
    whole = open_tokenizer(path)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 3])  # the tensors are cut off
    assert open_tokenizer(path).to_bytes() == whole.to_bytes()
    path.write_bytes(data[:1000])
    with pytest.raises(BundleError, match="GGUF header"):
        open_tokenizer(path)
    with pytest.raises(BundleError, match="no such file"):
        open_tokenizer(tmp_path / "none.gguf")


def test_smollm2_has_its_makers_sampling() -> None:
    assert Tokenizer.from_bytes(open_tokenizer("smollm2").to_bytes()).sampling == Sampling(0.2, 0.9)


def test_too_large_is_not_written(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("isthmus.models.language.checkpoint.tokenizer_format.MAX_TOKENIZER_BYTES", 1000)
    with pytest.raises(BundleError, match=r"tokenizer: \d+ bytes, at most 1000"):
        Tokenizer.open(tiny).to_bytes()


def test_a_rule_that_the_library_panics_on_is_an_error(tiny: Path) -> None:
    """A regular expression that takes too long ends in a panic of the library's Rust code."""
    content = json.loads((tiny / "tokenizer.json").read_text())
    split = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, BYTE_LEVEL]}
    (tiny / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = Tokenizer.from_bytes(Tokenizer.open(tiny).to_bytes())
    with pytest.raises(BundleError, match="tokenizers library failed: Onig: Regex search error"):
        tokenizer.encode("a" * 40 + "b")
    assert tokenizer.decode(tokenizer.encode("ab")) == "ab"


def test_lone_surrogates_are_refused_when_a_template_is_opened() -> None:
    for source, names in (("\ud800", {}), ("x", {"bos_token": "\ud800"})):
        with pytest.raises(BundleError, match="chat template"):
            ChatTemplate(source, names)


def test_opening_a_template_evaluates_nothing() -> None:
    """Jinja computes constants when it compiles: this one would have 100 GB."""
    template = ChatTemplate("{{ raise_exception('ran') }}{{ 'a' | center(100000000000) }}{{ 9 ** 9 ** 9 }}", {})
    with pytest.raises(InvalidInput, match="ran"):
        template.render([])


@pytest.mark.parametrize(
    "source",
    ["{% for a in b %}" * 25 + "{% endfor %}" * 25, "{% if a %}" * 150 + "{% endif %}" * 150, "{{" + "(" * 5000],
)
def test_templates_too_deep_for_python(source: str) -> None:
    with pytest.raises(BundleError, match="chat template"):
        ChatTemplate(source, {})
