"""Tokenizers made to hurt, as a service could send them: each ends in a BundleError, soon and in one line."""

from __future__ import annotations

import contextlib
import json
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.models.errors import BundleError, InvalidInput
from isthmus.models.language.checkpoint.tokenizer import Message, Tokenizer
from isthmus.models.language.checkpoint.tokenizer_files import MAX_TOKENIZER_BYTES
from tests.bench.tiny_llama import byte_tokenizer

GOOD = Tokenizer(byte_tokenizer(), merges=[], eos_ids=[2], template=None).to_bytes()
FIRST, SECOND = (json.loads(line) for line in GOOD.split(b"\n"))


def first(**changes: Any) -> bytes:
    return json.dumps({**FIRST, **changes}).encode() + b"\n" + json.dumps(SECOND).encode()


def second(**changes: Any) -> bytes:
    return json.dumps(FIRST).encode() + b"\n" + json.dumps({**SECOND, **changes}).encode()


def model(**changes: Any) -> bytes:
    return second(model={**SECOND["model"], **changes})


HEADER = {
    "empty": b"",
    "not JSON": b"PK\x03\x04\n{}",
    "not UTF-8": b"\x80\x81\n\x82",
    "a list": b"[]\n{}",
    "one line": json.dumps(FIRST).encode(),
    "one line, with its end": json.dumps(FIRST).encode() + b"\n",
    "the lines in the other order": b"\n".join(reversed(GOOD.split(b"\n"))),
    "deeply nested": b"[" * 1_000_000,
    "deeply nested in a field": first()[:-1].replace(b'"bos": []', b'"bos": ' + b"[" * 1_000_000),
    "number of a million digits": first().replace(b'"format": 1', b'"format": ' + b"9" * 1_000_000),
    "another format": first(format=2),
    "a text for a number": first(bos="1"),
    "a text for an id": first(eos=["1"]),
    "a fraction for an id": first(eos=[1.5]),
    "an id below 0": first(unused=[-1]),
    "an id of 64 bits": first(eos=[(1 << 64) - 1]),
    "an id beyond the vocabulary": first(eos=[259]),
    "an end beyond every vocabulary": first(eos=[1 << 20]),
    "many tokens before a text": first(bos=[1] * 17),
    "a digest that is none": first(merges="x"),
    "an unknown field": first(extra=1),
    "a field with line breaks": first(**{"\n\x1b[2J": 1}),
    "a sampling out of range": first(sampling={"temperature": 3.0, "top_p": 1.0}),
    "a sampling that is no number": first(sampling={"temperature": float("nan"), "top_p": 1.0}),
    "a template that is none": first(template={"source": "{% if", "tokens": {}}),
    "a template too long": first(template={"source": "x" * (1 << 19), "tokens": {}}),
    "a template with surrogates": first(template={"source": "\ud800", "tokens": {}}),
    "a template nested deeply": first(template={"source": "{{" + "(" * 20_000, "tokens": {}}),
    "a template that names much": first(template={"source": "x", "tokens": {str(name): "a" for name in range(17)}}),
    "an entry for each comma": GOOD + b"," * (1 << 23),
}

LIBRARY = {
    "second line not JSON": GOOD.split(b"\n")[0] + b"\nnot JSON",
    "second line not UTF-8": GOOD.split(b"\n")[0] + b"\n\x80\x81",
    "second line nested deeply": GOOD.split(b"\n")[0] + b"\n" + b"[" * 1_000_000,
    "a third line": GOOD + b"\n{}",
    "normalisers nested deeply": second().replace(
        b'"normalizer": null', b'"normalizer": ' + b'{"type":"Sequence","normalizers":[' * 100_000
    ),
    "no model": second(model=None),
    "a model of another type": second(model={"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}),
    "an id of 32 bits": model(vocab={"a": (1 << 32) - 1}),
    "an id of 64 bits": model(vocab={"a": 1 << 63}),
    "an id beyond the largest vocabulary": model(vocab={**SECOND["model"]["vocab"], "zz": 1 << 20}),
    "a negative id": model(vocab={"a": -1}),
    "merges of what is not there": model(merges=[["x", "yy"]]),
    "merges of one": model(merges=[["x"]]),
    "unigram without a vocabulary": second(model={"type": "Unigram", "vocab": [], "unk_id": 0}),
    "unigram with an unknown token beyond": second(model={"type": "Unigram", "vocab": [["a", 0.0]], "unk_id": 9}),
    "unigram with an infinite score": second(model={"type": "Unigram", "vocab": [["a", float("inf")]], "unk_id": 0}),
    "an added token without a text": second(added_tokens=[{"id": 1}]),
    "an added token of 64 bits": second(added_tokens=[{**SECOND["added_tokens"][0], "id": 1 << 40}]),
    "a regular expression that is none": second(
        pre_tokenizer={"type": "Split", "pattern": {"Regex": "(" * 9}, "behavior": "Isolated", "invert": False}
    ),
    "a regular expression nested deeply": second(
        pre_tokenizer={
            "type": "Split",
            "pattern": {"Regex": "(" * 50_000 + ")" * 50_000},
            "behavior": "Isolated",
            "invert": False,
        }
    ),
    "another decoder": second(decoder={"type": "WordPiece", "prefix": "##", "cleanup": True}),
}


@pytest.mark.parametrize("raw", [*HEADER.values(), *LIBRARY.values()], ids=[*HEADER, *LIBRARY])
def test_hostile_tokenizers_end_in_one_line(raw: bytes) -> None:
    with pytest.raises(BundleError) as caught:
        Tokenizer.from_bytes(raw)
    message = str(caught.value)
    assert message.startswith(("tokenizer: ", "chat template: "))
    assert "\n" not in message and "\x1b" not in message
    assert len(message) < 1000 and message.encode()


def test_size_is_checked_before_anything_is_read() -> None:
    with pytest.raises(BundleError, match=f"tokenizer: {MAX_TOKENIZER_BYTES + 1} bytes, at most {MAX_TOKENIZER_BYTES}"):
        Tokenizer.from_bytes(bytes(MAX_TOKENIZER_BYTES + 1))


@given(at=st.integers(0, len(GOOD)), value=st.binary(min_size=1, max_size=6))
def test_any_change_opens_or_is_a_bundle_error(at: int, value: bytes) -> None:
    data = bytearray(GOOD)
    data[at : at + len(value)] = value
    with contextlib.suppress(BundleError):
        Tokenizer.from_bytes(bytes(data)).encode("a text")


def test_any_cut_is_a_bundle_error() -> None:
    for end in random.Random(0).sample(range(len(GOOD)), 200):
        with pytest.raises(BundleError):
            Tokenizer.from_bytes(GOOD[:end])


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}{{ messages.__class__.__subclasses__() }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ messages.append(1) }}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
        "{% for a in range(1000000000) %}{% endfor %}",
        "{{ raise_exception('no') }}",
        "{{ 1 / 0 }}",
        "{{ (0).bit_length.__self__.__class__(9) }}",
    ],
)
def test_templates_do_not_leave_their_sandbox(source: str) -> None:
    tokenizer = Tokenizer.from_bytes(first(template={"source": source, "tokens": {}}))
    with pytest.raises(InvalidInput, match="the chat template rejects these messages"):
        tokenizer.chat([Message("user", "hello")])
