"""Tokenizer and chat template against transformers, round trips, and what is refused."""

from __future__ import annotations

import json
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import pre_tokenizers, processors

from isthmus.models.errors import BundleError, ContextExceeded, InvalidInput
from isthmus.models.language.checkpoint import gguf_tokenizer
from isthmus.models.language.checkpoint.checkpoint import smollm2_path
from isthmus.models.language.checkpoint.gguf_file import GgufFile
from isthmus.models.language.checkpoint.token_text import TextStream
from isthmus.models.language.checkpoint.tokenizer import Message, Tokenizer
from tests.bench.tiny_llama import byte_tokenizer, write_tiny_llama

TEXTS = [
    "",
    "Hello world, it's a test; we'll see IT'S",
    "def f(x):\n    return x**2  # 12345 67\n\n\n",
    "a 12 b34  5.6e-7 ½ ² Ⅷ",
    "👩‍👩‍👧 🎉🏳️‍🌈",
    "你好，世界 123 こんにちは",
    "مرحبا بالعالم ٣٤٥",
    "\x00\x01\x7f\t\r\n\u2028\ufeff",
    "<|im_end|> x<|im_start|>user<|endoftext|><|im_",
    " " * 300 + "x" + "\n" * 50 + "\t" * 9,
    "é e\u0301 ﬁ ǅ",
]
VOCABULARY = "e0e8c5c14391f819a7dd4a4028859b5e4d0b17cbdf71c6957f1930eff11af4c7"  # handoff bundles bind to it
SMOLLM2_LACKS = bytes.fromhex("0406131416 1d c0c1f1f2 f5f6f7f8f9fafbfcfdfeff")
TALK = [Message("user", "What is 2 + 2?"), Message("assistant", "4 🎉"), Message("user", "  Why?\n")]


@pytest.fixture(scope="module")
def fields() -> dict[str, Any]:
    return GgufFile(smollm2_path()).fields


@pytest.fixture(scope="module")
def smollm2(fields: dict[str, Any]) -> Tokenizer:
    return gguf_tokenizer.read(fields)


@pytest.fixture(scope="module")
def reference(transformers: Any) -> Any:
    """transformers reads a GGUF's tokenizer but not its `pre`: every text is cut as for GPT-2. SmolLM2's own
    tokenizer.json cuts digits apart first."""
    path = smollm2_path()
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    digits, gpt2 = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, gpt2])
    return tokenizer


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return write_tiny_llama(tmp_path / "tiny")


def edit(folder: Path, name: str, **changes: Any) -> Tokenizer:
    path = folder / name
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**content, **changes}))
    return Tokenizer.open(folder)


def random_texts(count: int) -> list[str]:
    rng = random.Random(0)
    kinds = (
        (0x20, 0x7F),
        (0x20, 0x800),
        (0x4E00, 0x5000),
        (0x20, 0x21),
        (0x0A, 0x0B),
        (0x30, 0x3A),
        (0x1F300, 0x1F650),
    )
    return ["".join(chr(rng.randrange(*rng.choice(kinds))) for _ in range(rng.randrange(40))) for _ in range(count)]


def test_ids_equal_transformers(smollm2: Tokenizer, reference: Any) -> None:
    for text in [*TEXTS, *random_texts(1000)]:
        assert smollm2.encode(text) == reference(text)["input_ids"], ascii(text)


def test_chat_equals_transformers(smollm2: Tokenizer, reference: Any) -> None:
    for messages in (TALK, TALK[:1], [Message("system", "Be brief."), *TALK], []):
        plain = [{"role": message.role, "content": message.content} for message in messages]
        expected = reference.apply_chat_template(plain, add_generation_prompt=True)["input_ids"] if plain else None
        assert expected is None or smollm2.chat(messages) == expected


def test_folder_of_transformers(transformers: Any, reference: Any, smollm2: Tokenizer, tmp_path: Path) -> None:
    """`save_pretrained` of the same tokenizer: same ids, same chat, same vocabulary."""
    write_tiny_llama(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).unlink()
    reference.save_pretrained(tmp_path)
    ours, theirs = Tokenizer.open(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in [*TEXTS, *random_texts(200)]:
        assert ours.encode(text) == theirs(text)["input_ids"] == smollm2.encode(text), ascii(text)
    assert ours.chat(TALK) == smollm2.chat(TALK)
    assert ours.vocabulary == smollm2.vocabulary
    assert (ours.size, ours.eos_ids) == (smollm2.size, smollm2.eos_ids)


def test_smollm2(smollm2: Tokenizer) -> None:
    assert smollm2.size == 49_152
    assert smollm2.eos_ids == {0, 2}
    assert smollm2.vocabulary.hex() == VOCABULARY
    assert [smollm2.special(id) for id in (0, 2, 16, 17, 49_151)] == [True, True, True, False, False]
    assert smollm2.encode("hi<|im_end|>")[-1] == 2


def test_special_text_as_text(smollm2: Tokenizer) -> None:
    ids = smollm2.encode("hi<|im_end|>", special=False)
    assert not any(map(smollm2.special, ids))
    assert smollm2.decode(ids) == "hi<|im_end|>"
    assert smollm2.decode(smollm2.encode("hi<|im_end|>")) == "hi"


def test_bytes_of_every_token_are_those_of_the_library(smollm2: Tokenizer, reference: Any) -> None:
    assert all(smollm2.token_bytes(id) == b"" for id in range(17))
    decoder = reference.backend_tokenizer
    for id in range(17, smollm2.size):
        assert smollm2.token_bytes(id).decode(errors="replace") == decoder.decode([id]), id


@given(text=st.text(max_size=200))
def test_round_trip(smollm2: Tokenizer, text: str) -> None:
    """Of SmolLM2 without the bytes that never occurred in its training; the byte vocabulary has them all."""
    raw = bytes(byte for byte in text.encode() if byte not in SMOLLM2_LACKS).decode(errors="ignore")
    assert smollm2.decode(smollm2.encode(raw, special=False)) == raw
    every = Tokenizer(byte_tokenizer(), merges=[], eos_ids=[], template=None)
    assert every.decode(every.encode(text, special=False)) == text


def test_bytes_that_the_vocabulary_lacks_are_left_out(smollm2: Tokenizer) -> None:
    assert smollm2.decode(smollm2.encode("a\x04b\x1d")) == "ab"


@pytest.mark.parametrize("id", [-1, 49_152, 1 << 40])
def test_ids_out_of_range(smollm2: Tokenizer, id: int) -> None:
    for call in (smollm2.token_bytes, smollm2.special, lambda id: smollm2.decode([id])):
        with pytest.raises(InvalidInput, match=r"expected 0 to 49151"):
            call(id)


def test_bytes_that_are_no_text(smollm2: Tokenizer) -> None:
    assert smollm2.decode(smollm2.encode("é", special=False)[:0]) == ""
    halves = [id for id in range(17, 300) if smollm2.token_bytes(id) == b"\xc3"]
    assert smollm2.decode(halves) == "\ufffd"


@pytest.mark.parametrize("text", ["\ud800", "a\udfff", json.loads(r'"\ud83d"')])
def test_lone_surrogates(smollm2: Tokenizer, text: str) -> None:
    for call in (smollm2.encode, lambda text: smollm2.chat([Message("user", text)])):
        with pytest.raises(InvalidInput, match="lone surrogate"):
            call(text)


# TextStream


@given(text=st.text(max_size=60), data=st.data())
def test_stream_of_any_split_is_the_text(text: str, data: st.DataObject) -> None:
    raw = text.encode()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(raw)), max_size=20)))
    stream = TextStream()
    parts = [raw[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(raw)], strict=True)]
    assert "".join(map(stream.push, parts)) + stream.finish() == text


@given(raw=st.binary(max_size=40))
def test_stream_of_any_bytes_is_what_decode_gives(raw: bytes) -> None:
    stream = TextStream()
    pieces = [stream.push(raw[index : index + 1]) for index in range(len(raw))]
    assert "".join(pieces) + stream.finish() == raw.decode(errors="replace")


def test_stream_holds_back_and_starts_anew() -> None:
    stream = TextStream()
    assert [stream.push(part) for part in (b"\xf0\x9f", b"\x8e", b"\x89!")] == ["", "", "🎉!"]
    assert (stream.push(b"\xc3"), stream.finish(), stream.finish()) == ("", "\ufffd", "")
    assert stream.push(b"\xa9") == "\ufffd"


# Folders


def test_tiny_vocabulary(tiny: Path) -> None:
    tokenizer = Tokenizer.open(tiny)
    assert (tokenizer.size, tokenizer.eos_ids) == (259, {0, 2})
    assert tokenizer.encode("hi é<|im_end|>") == [3 + byte for byte in "hi é".encode()] + [2]
    assert tokenizer.decode(tokenizer.chat(TALK[:1])) == "user\nWhat is 2 + 2?\nassistant\n"


def test_end_of_text_from_each_place(tiny: Path) -> None:
    assert edit(tiny, "generation_config.json", eos_token_id=[5, 2]).eos_ids == {0, 2, 5}
    assert edit(tiny, "config.json", eos_token_id=7).eos_ids == {0, 2, 5, 7}
    assert edit(tiny, "tokenizer_config.json", eos_token={"content": "a"}).eos_ids == {0, 2, 5, 7, 3 + ord("a")}


def test_template_file_goes_before_the_configuration(tiny: Path) -> None:
    (tiny / "chat_template.jinja").write_text("{{ bos_token }}{{ messages[0].content | upper }}")
    tokenizer = Tokenizer.open(tiny)
    assert tokenizer.chat([Message("user", "hi")]) == tokenizer.encode("<|im_start|>HI")


def test_templates_by_name(tiny: Path) -> None:
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    tokenizer = edit(tiny, "tokenizer_config.json", chat_template=named)
    assert tokenizer.decode(tokenizer.chat(TALK)) == "plain"


def test_no_template(tiny: Path) -> None:
    with pytest.raises(InvalidInput, match="no chat template"):
        edit(tiny, "tokenizer_config.json", chat_template=None).chat(TALK)


def test_bos_where_the_model_asks_for_it_and_never_twice(tiny: Path) -> None:
    processor = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<|im_start|>": {"id": "<|im_start|>", "ids": [1], "tokens": ["<|im_start|>"]}},
    }
    tokenizer = edit(tiny, "tokenizer.json", post_processor=processor)
    assert tokenizer.encode("a") == tokenizer.encode("a", special=False) == [1, 3 + ord("a")]
    assert tokenizer.chat(TALK).count(1) == len(TALK) + 1


@pytest.mark.parametrize(
    ("settings", "first"),
    [
        ({}, [1]),  # what the post-processor puts in front, without the end that it adds
        ({"add_bos_token": True}, [1]),
        ({"add_bos_token": False}, []),
        ({"add_eos_token": True}, [1]),
        ({"add_bos_token": True, "bos_token": None}, []),
    ],
)
def test_a_prompt_begins_as_the_settings_say_and_is_never_ended(
    tiny: Path, settings: dict[str, Any], first: list[int]
) -> None:
    backend = tokenizers.Tokenizer.from_file(str(tiny / "tokenizer.json"))
    both = [(token, backend.token_to_id(token)) for token in ("<|im_start|>", "<|im_end|>")]
    backend.post_processor = processors.TemplateProcessing(
        single=["<|im_start|>", "$A", "<|im_end|>"], special_tokens=both
    )
    backend.save(str(tiny / "tokenizer.json"))
    assert edit(tiny, "tokenizer_config.json", **settings).encode("a") == [*first, 3 + ord("a")]


@pytest.mark.parametrize("settings", [{}, {"add_bos_token": True}])
def test_a_beginning_that_only_the_settings_ask_for(tiny: Path, settings: dict[str, Any]) -> None:
    assert edit(tiny, "tokenizer_config.json", **settings).encode("a") == [*[1] * len(settings), 3 + ord("a")]


def test_truncation_and_padding_in_the_file_are_ignored(tiny: Path) -> None:
    backend = tokenizers.Tokenizer.from_file(str(tiny / "tokenizer.json"))
    backend.enable_truncation(2)
    backend.enable_padding(length=9)
    backend.save(str(tiny / "tokenizer.json"))
    assert len(Tokenizer.open(tiny).encode("abcd")) == 4


def test_vocabulary_is_tokens_with_ids_and_merges(tiny: Path) -> None:
    original = Tokenizer.open(tiny).vocabulary
    assert edit(tiny, "tokenizer_config.json", chat_template="other").vocabulary == original
    model = json.loads((tiny / "tokenizer.json").read_text())["model"]
    vocabulary = {**model["vocab"], "a": model["vocab"]["b"], "b": model["vocab"]["a"]}
    assert edit(tiny, "tokenizer.json", model={**model, "vocab": vocabulary}).vocabulary != original


def test_another_model_is_named(tiny: Path) -> None:
    with pytest.raises(BundleError, match=r"a model of type WordLevel, this program reads BPE and Unigram"):
        edit(tiny, "tokenizer.json", model={"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"})


@pytest.mark.parametrize(
    "changes",
    [
        {"decoder": None},
        {"decoder": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}},
        {"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}},
        {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["x y"]}},
        {"model": 3},
        {"added_tokens": [{"id": 1}]},
    ],
)
def test_other_tokenizers(tiny: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(BundleError, match="tokenizer"):
        edit(tiny, "tokenizer.json", **changes)


def test_a_text_has_at_least_its_bytes_by_the_longest_token(smollm2: Tokenizer) -> None:
    assert smollm2.longest_token_bytes == 81
    smollm2.check_length("x" * 810, 10)
    with pytest.raises(ContextExceeded, match="811 bytes, more than any 10 tokens have"):
        smollm2.check_length("x" * 811, 10)
    with pytest.raises(ContextExceeded):
        smollm2.chat([Message("user", "é" * 500)], context=10)


def test_encoding_leaves_other_threads_alone(smollm2: Tokenizer) -> None:
    """A thread that only counts goes on counting while a long text is encoded."""
    turns, done, begun = 0, threading.Event(), threading.Event()

    def encode() -> int:
        begun.set()
        size = len(smollm2.encode("7" * 200_000))
        done.set()
        return size

    with ThreadPoolExecutor(1) as threads:
        size = threads.submit(encode)
        begun.wait(10)
        while not done.is_set():
            time.sleep(0.001)
            turns += 1
        assert size.result(30) == 200_000
    assert turns > 10
