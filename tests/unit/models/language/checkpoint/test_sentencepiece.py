"""SentencePiece vocabularies of each kind of file against the `tokenizers` library and the algorithm by hand."""

from __future__ import annotations

import contextlib
import random
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, pre_tokenizers

from isthmus.models.errors import BundleError
from isthmus.models.language.checkpoint import gguf_tokenizer, sentencepiece
from isthmus.models.language.checkpoint.tokenizer import Message, Tokenizer
from tests.bench.tiny_sentencepiece import (
    Style,
    gguf_fields,
    sentencepiece_model,
    tiny_pieces,
    tokenizer_json,
    write_tokenizer,
)

TEXTS = [
    "",
    " ",
    "   three spaces",
    "The quick brown fox",
    "the other dogs jumped\n\n  over\tthere \n",
    "世界 こんにちは、你好 안녕",
    "👩‍👩‍👧 🎉x🏳️‍🌈",
    "\x00\x01\x7f\u2028\ufeff é e\u0301 ﬁ",
    "▁ is a character <0x41> too",
    "hello</s>world <s> <unk>",
]


def open_json(backend: tokenizers.Tokenizer, folder: Path) -> Tokenizer:
    backend.save(str(folder / "tokenizer.json"))
    return Tokenizer.open(folder)


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    """The same vocabulary from each kind of file."""
    json_folder, model_folder = (tmp_path_factory.mktemp(name) for name in ("json", "model"))
    return {
        "json": Tokenizer.open(write_tokenizer(json_folder, "tokenizer.json")),
        "model": Tokenizer.open(write_tokenizer(model_folder, "tokenizer.model")),
        "gguf": gguf_tokenizer.read(gguf_fields()),
    }


def by_hand(text: str) -> list[int]:
    """SentencePiece's BPE: join the neighbours whose piece scores best, the first of equals, until none is left."""
    pieces = tiny_pieces()
    ids = {token: id for id, token in enumerate(pieces.tokens)}
    parts = list("▁" + text.replace(" ", "▁"))
    while True:
        joined = [(pieces.scores[ids[a + b]], -at) for at, (a, b) in enumerate(pairwise(parts)) if a + b in ids]
        if not joined:
            break
        at = -max(joined)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    found = []
    for part in parts:
        found += [ids[part]] if part in ids else [ids[f"<0x{byte:02X}>"] for byte in part.encode()]
    return found


@pytest.mark.parametrize("kind", ["json", "model", "gguf"])
def test_ids_and_texts_are_the_librarys(kinds: dict[str, Tokenizer], kind: str) -> None:
    tokenizer, reference = kinds[kind], tokenizer_json()
    for text in TEXTS:
        expected = reference.encode(text).ids
        assert tokenizer.encode(text) == expected, ascii(text)
        assert tokenizer.decode(expected) == reference.decode(expected), ascii(text)


@pytest.mark.parametrize("kind", ["json", "model", "gguf"])
def test_special_tokens_of_untrusted_text_are_text(kinds: dict[str, Tokenizer], kind: str) -> None:
    ids = kinds[kind].encode("a</s>b", special=False)
    assert ids[0] == 1 and 2 not in ids and kinds[kind].decode(ids) == "a</s>b"
    assert kinds[kind].encode("a</s>b").count(2) == 1


@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁<"), min_size=1, max_size=60))
@settings(max_examples=300)
def test_gguf_without_merges_encodes_as_sentencepiece(kinds: dict[str, Tokenizer], text: str) -> None:
    assert kinds["gguf"].encode(text) == [1, *by_hand(text)]
    assert kinds["gguf"].decode(kinds["gguf"].encode(text)) == text


def test_words_of_the_vocabulary_encode_as_sentencepiece(kinds: dict[str, Tokenizer]) -> None:
    rng = random.Random(0)
    words = [token.replace("▁", " ") for token in tiny_pieces().tokens[259:]]
    for _ in range(500):
        text = "".join(rng.choices(words, k=rng.randrange(1, 12)))
        assert kinds["gguf"].encode(text) == [1, *by_hand(text)], text


@pytest.mark.parametrize("style", ["prepend", "metaspace"])
@pytest.mark.parametrize("unigram", [False, True])
def test_tokenizer_json_of_other_styles(tmp_path: Path, style: Style, unigram: bool) -> None:
    reference = tokenizer_json(style, unigram=unigram)
    tokenizer = open_json(reference, tmp_path)
    for text in TEXTS:
        expected = reference.encode(text).ids
        assert tokenizer.encode(text) == expected, ascii(text)
        assert tokenizer.decode(expected) == reference.decode(expected), ascii(text)


def test_metaspace_decoder(tmp_path: Path) -> None:
    reference = tokenizer_json("metaspace")
    reference.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace("▁", "first")])
    tokenizer = open_json(reference, tmp_path)
    for text in ["The quick fox", "  two", "世界", "fox 🎉"]:
        ids = reference.encode(text).ids
        assert tokenizer.decode(ids) == reference.decode(ids), ascii(text)


def test_every_token_has_the_librarys_text(kinds: dict[str, Tokenizer]) -> None:
    """Between two others, as at the start of a text a space is left out."""
    reference, x = tokenizer_json(), tiny_pieces().tokens.index("x")
    for id in range(kinds["json"].size):
        assert kinds["json"].decode([x, id, x]) == reference.decode([x, id, x]), id
        assert kinds["gguf"].token_bytes(id) == kinds["json"].token_bytes(id) == kinds["model"].token_bytes(id)


def test_one_vocabulary_for_every_kind_of_file(kinds: dict[str, Tokenizer], tmp_path: Path) -> None:
    assert len({tokenizer.vocabulary for tokenizer in kinds.values()}) == 1
    assert open_json(tokenizer_json(unigram=True), tmp_path).vocabulary != kinds["json"].vocabulary


def test_chat_begins_once(kinds: dict[str, Tokenizer]) -> None:
    talk = [Message("user", "hello"), Message("assistant", "world"), Message("user", "the fox")]
    text = "<s>[INST] hello [/INST] world</s>[INST] the fox [/INST]"
    for kind in ("json", "model"):
        assert kinds[kind].chat(talk) == tokenizer_json().encode(text, add_special_tokens=False).ids
        assert kinds[kind].chat(talk).count(1) == 1
    assert not kinds["gguf"].has_template and kinds["json"].has_template


@pytest.mark.parametrize(
    ("changes", "first", "ends"),
    [
        ({}, [1], {2}),
        ({"bos_token_id": None, "eos_token_id": None}, [1], {2}),
        ({"add_bos_token": False}, [], {2}),
        ({"add_eos_token": True}, [1], {2}),
        ({"eot_token_id": 300, "eom_token_id": 301}, [1], {2, 300, 301}),
    ],
)
def test_first_and_last_tokens_of_gguf(changes: dict[str, Any], first: list[int], ends: set[int]) -> None:
    """Without keys llama.cpp's: 1 before every text, 2 ends one. A prompt is never ended."""
    tokenizer = gguf_tokenizer.read(gguf_fields(**changes))
    assert tokenizer.eos_ids == ends
    assert tokenizer.encode("the fox") == first + by_hand("the fox")


def test_a_gguf_can_leave_the_space_out() -> None:
    tokenizer = gguf_tokenizer.read(gguf_fields(add_space_prefix=False, add_bos_token=False))
    assert tokenizer.decode(tokenizer.encode(" fox")) == " fox" and tokenizer.leading_spaces == 0
    assert tokenizer.token_bytes(tokenizer.encode("fox")[0])[:1] != b" "


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "t5"}, "ggml.model is t5, this program reads gpt2"),
        ({"scores": None}, "scores is missing"),
        ({"scores": [1.0]}, "expected as many scores"),
        ({"scores": [float("nan")] * len(tiny_pieces().tokens)}, "not finite"),
        ({"token_type": [1] * len(tiny_pieces().tokens)}, "no token has the type unknown"),
        ({"tokens": ["x" * 600, *tiny_pieces().tokens[1:]]}, "600 characters"),
        ({"bos_token_id": 9999}, "without a bos_token_id"),
    ],
)
def test_hostile_gguf_headers(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(BundleError, match=message):
        gguf_tokenizer.read(gguf_fields(**changes))


def test_tokenizer_model_of_unigram() -> None:
    pieces = replace(tiny_pieces(), unigram=True)
    parsed = sentencepiece.parse(sentencepiece_model(pieces))
    assert parsed == pieces
    reference = tokenizer_json(unigram=True)
    for text in TEXTS:
        assert sentencepiece.build(parsed).encode(text).ids == reference.encode(text, add_special_tokens=False).ids


def test_added_tokens_of_a_folder_with_tokenizer_model(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path, "tokenizer.model")
    size = len(tiny_pieces().tokens)
    (folder / "added_tokens.json").write_text(f'{{"<|im_end|>": {size}}}')
    tokenizer = Tokenizer.open(folder)
    assert tokenizer.encode("fox<|im_end|>")[-1] == size and tokenizer.eos_ids == {2, size}
    (folder / "added_tokens.json").write_text(f'{{"<|im_end|>": {size + 5}}}')
    with pytest.raises(BundleError, match="added token"):
        Tokenizer.open(folder)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not a SentencePiece model"),
        (b"IQ== 0\nIg== 1\n", "not a SentencePiece model"),  # Llama 3's tokenizer.model, of tiktoken
        (b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\x01", "not a SentencePiece model"),
        (sentencepiece_model(tiny_pieces(), normalizer=b""), "remove_extra_whitespaces"),
        (sentencepiece_model(tiny_pieces(), normalizer=b"\x20\x00\x12\x01x"), "precompiled_charsmap"),
    ],
)
def test_hostile_tokenizer_models(tmp_path: Path, data: bytes, message: str) -> None:
    folder = write_tokenizer(tmp_path, "tokenizer.model")
    (folder / "tokenizer.model").write_bytes(data)
    with pytest.raises(BundleError, match=message):
        Tokenizer.open(folder)


@given(at=st.integers(0, 6000), value=st.binary(min_size=1, max_size=6))
def test_any_change_of_a_tokenizer_model_opens_or_is_a_bundle_error(at: int, value: bytes) -> None:
    data = bytearray(sentencepiece_model(tiny_pieces()))
    data[at : at + len(value)] = value
    with contextlib.suppress(BundleError):
        sentencepiece.check(sentencepiece.parse(bytes(data)))


def test_a_decoder_with_other_steps_is_named(tmp_path: Path) -> None:
    reference = tokenizer_json()
    reference.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.WordPiece()])
    with pytest.raises(BundleError, match="decoder Replace, WordPiece"):
        open_json(reference, tmp_path)
    reference.decoder = decoders.Sequence([decoders.Replace("_", " ")])
    with pytest.raises(BundleError, match="decoder Replace"):
        open_json(reference, tmp_path)
    reference.pre_tokenizer = pre_tokenizers.Whitespace()
    reference.decoder = None
    with pytest.raises(BundleError, match="decoder none"):
        open_json(reference, tmp_path)
