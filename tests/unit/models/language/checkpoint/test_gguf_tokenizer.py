"""Tokenizers out of GGUF headers: where text is cut, kinds of tokens, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from isthmus.models.errors import BundleError
from isthmus.models.language.checkpoint import gguf_tokenizer
from isthmus.models.language.checkpoint.token_text import BYTES


def little(**changes: Any) -> dict[str, Any]:
    """Header of a vocabulary of bytes and a few merges; None takes a key out."""
    merges = ["a b", "Ġ 1", "1 2", "12 3", "Ġ a"]
    words = [merge.replace(" ", "") for merge in merges]
    tokens = ["<|end|>", *sorted(BYTES, key=BYTES.__getitem__), *words, "<tool>", "[PAD]"]
    content = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": tokens,
        "token_type": [3] + [1] * 261 + [4, 5],
        "merges": merges,
        "bos_token_id": 0,
        "eot_token_id": 0,
        **changes,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in content.items() if value is not None}


@pytest.mark.parametrize(
    ("pre", "words"),
    [
        ("gpt-2", ["Ġ1", "2", "3", "ab"]),
        ("smollm", ["Ġ", "1", "2", "3", "ab"]),
        ("llama-bpe", ["Ġ", "123", "ab"]),
        ("llama3", ["Ġ", "123", "ab"]),
        ("llama-v3", ["Ġ", "123", "ab"]),
        ("qwen2", ["Ġ", "1", "2", "3", "ab"]),
    ],
)
def test_where_text_is_cut(pre: str, words: list[str]) -> None:
    fields = little(pre=pre)
    tokens = fields["tokenizer.ggml.tokens"]
    ids = gguf_tokenizer.read({**fields, "tokenizer.ggml.add_bos_token": False}).encode(" 123ab")
    assert [tokens[id] for id in ids] == words


@pytest.mark.parametrize("pre", ["llama-bpe", "qwen2"])
def test_cuts_are_those_of_the_published_files(pre: str) -> None:
    """As in the tokenizer.json of Llama 3 and of Qwen 2."""
    cut = gguf_tokenizer.pre_tokenizer(pre).pre_tokenize_str("I'LL 1234 x_y!\n\n  z")
    words = [word.replace("Ġ", " ").replace("Ċ", "\n") for word, _ in cut]
    number = ["123", "4"] if pre == "llama-bpe" else ["1", "2", "3", "4"]
    assert words == ["I", "'LL", " ", *number, " x", "_y", "!\n\n", " ", " z"]


def test_kinds_of_tokens() -> None:
    tokenizer = gguf_tokenizer.read(little())
    assert tokenizer.eos_ids == {0}
    ids = tokenizer.encode("ab<tool><|end|>[PAD]")
    assert ids[1:3] == [262, 0] and 263 not in ids
    assert [tokenizer.token_bytes(id) for id in (257, 262, 0, 263)] == [b"ab", b"<tool>", b"", b""]
    assert [tokenizer.special(id) for id in (258, 262, 0, 263)] == [False, False, True, True]


def test_bos_of_gguf() -> None:
    assert gguf_tokenizer.read(little(add_bos_token=True)).encode("ab") == [0, 257]
    assert gguf_tokenizer.read(little(pre="llama-bpe")).encode("ab", special=False) == [0, 257]
    assert gguf_tokenizer.read(little()).encode("ab") == [257]
    with pytest.raises(BundleError, match="without a bos_token_id"):
        gguf_tokenizer.read(little(add_bos_token=True, bos_token_id=999))


def test_qwen_composes_characters() -> None:
    tokenizer = gguf_tokenizer.read(little(pre="qwen2"))
    assert tokenizer.decode(tokenizer.encode("e\u0301")) == "é"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "bert"}, r"model is bert, this program reads gpt2"),
        ({"pre": "tekken"}, r"pre is tekken, this program reads smollm"),
        ({"pre": "default"}, r"ggml\.pre is missing or default.*expected smollm, gpt-2, llama-bpe.*--pre-tokenizer"),
        ({"pre": None}, r"ggml\.pre is missing or default.*expected smollm, gpt-2, llama-bpe.*--pre-tokenizer"),
        ({"tokens": None}, "tokens is missing"),
        ({"tokens": [1, 2]}, "tokens is missing or not an array of str"),
        ({"tokens": ["a"] * 264}, "no duplicates"),
        ({"token_type": [1]}, "264 tokens, 1 types"),
        ({"token_type": [1.0] * 264}, "token_type is missing or not an array of int"),
        ({"merges": None}, "merges is missing"),
        ({"merges": ["nothing"]}, "GGUF tokenizer"),
        ({"merges": ["xx yy"]}, "GGUF tokenizer"),
        ({"eom_token_id": 264}, "end-of-text id 264"),
        ({"eot_token_id": 264}, "end-of-text id 264"),
        ({"eot_token_id": "x"}, "end-of-text id x"),
    ],
)
def test_hostile_headers(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(BundleError, match=message):
        gguf_tokenizer.read(little(**changes))
