from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.edge_agent.language.detokenize import Detokenizer, Outcome, TextDelta, detokenize, overlap
from isthmus.edge_agent.language.request import Summary, Token
from isthmus.models.language.checkpoint import gguf_tokenizer
from isthmus.models.language.checkpoint.tokenizer import Tokenizer
from tests.bench.tiny_sentencepiece import gguf_fields, tiny_pieces, tokenizer_json

END = 1_000_000


class Table:
    """A tokenizer whose tokens are these pieces."""

    eos_ids = frozenset({END})
    leading_spaces = 0

    def __init__(self, pieces: list[bytes]) -> None:
        self.pieces = pieces
        self.size = len(pieces)

    def token_bytes(self, id: int) -> bytes:
        return self.pieces[id]


def deltas(pieces: list[bytes], stops: list[str]) -> tuple[list[list[TextDelta]], Detokenizer]:
    """What each token releases, and last what the end releases."""
    detokenizer = Detokenizer(Table(pieces), stops)  # type: ignore[arg-type]
    steps = [list(detokenizer.push(Token(id, "edge"))) for id in range(len(pieces))]
    return [*steps, list(detokenizer.finish())], detokenizer


def texts(pieces: list[bytes], *stops: str) -> list[str]:
    return ["".join(delta.text for delta in step) for step in deltas(pieces, list(stops))[0]]


def expected_text(data: bytes, stops: list[str]) -> str:
    """The definition: decode everything, cut before the stop string that ends first."""
    text = data.decode("utf-8", "replace")
    for end in range(len(text) + 1):
        starts = [end - len(stop) for stop in stops if stop and text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)]
    return text


@pytest.mark.parametrize(
    ("pieces", "stops", "expected"),
    [
        ([b"ab", b"cd"], [], ["ab", "cd", ""]),
        (["é".encode()[:1], "é".encode()[1:]], [], ["", "é", ""]),
        ([b"a\xe2\x82", b"\xac"], [], ["a", "€", ""]),
        ([b"a", b"\xf0\x9f"], [], ["a", "", "\ufffd"]),
        ([b"a\xf0\x9f"], [], ["a", "\ufffd"]),
        ([b"a\n", b"\nb"], ["\n\n"], ["", "a", ""]),
        ([b"a", b"\n", b"b"], ["\n\n"], ["a", "", "\nb", ""]),
        ([b"a", b"\n"], ["\n\n"], ["a", "", "\n"]),
        ([b"one STOP two"], ["STOP"], ["one ", ""]),
        ([b"STOP"], ["STOP"], ["", ""]),
        ([b"abcd"], ["abcd", "bc"], ["a", ""]),
        ([b"a", b"b", b"c", b"d"], ["abcd", "bc"], ["", "", "a", "", ""]),
        ([b"xabc"], ["abc", "c"], ["x", ""]),
        (["€".encode()[:2], "€".encode()[2:] + b"x"], ["€"], ["", "", ""]),
    ],
)
def test_text_is_released_as_early_as_possible(pieces: list[bytes], stops: list[str], expected: list[str]) -> None:
    assert texts(pieces, *stops) == expected


@given(
    st.lists(st.binary(max_size=5) | st.text("abé€", max_size=4).map(str.encode), max_size=12),
    st.lists(st.text("abé€\ufffd", min_size=1, max_size=4), max_size=4),
)
def test_the_split_into_tokens_does_not_matter(pieces: list[bytes], stops: list[str]) -> None:
    steps, detokenizer = deltas(pieces, stops)
    expected = expected_text(b"".join(pieces), stops)
    assert "".join(delta.text for step in steps for delta in step) == expected
    assert detokenizer.stopped == (expected != b"".join(pieces).decode("utf-8", "replace"))


@given(st.lists(st.binary(min_size=1, max_size=4), max_size=10))
def test_without_stop_strings_every_token_is_released_once_and_in_order(pieces: list[bytes]) -> None:
    tokens = [delta.token.id for step in deltas(pieces, [])[0] for delta in step if delta.token]
    assert tokens == list(range(len(pieces)))


def test_a_token_is_released_together_with_its_text() -> None:
    steps, _ = deltas([b"a", b"\xc3", b"\xa9", b"!"], [])
    assert [[(delta.token.id, delta.text) for delta in step if delta.token] for step in steps] == [
        [(0, "a")],
        [],
        [(1, ""), (2, "é")],
        [(3, "!")],
        [],
    ]


def test_tokens_inside_a_stop_string_are_not_released() -> None:
    steps, _ = deltas([b"ab", b"cS", b"TO", b"P"], ["STOP"])
    assert [(delta.token.id, delta.text) for step in steps for delta in step if delta.token] == [(0, "ab"), (1, "c")]


def test_end_of_text_and_ids_of_a_padded_vocabulary_have_no_text() -> None:
    detokenizer = Detokenizer(Table([b"a"]))  # type: ignore[arg-type]
    assert detokenizer.push(Token(END, "edge")) == ()
    assert detokenizer.push(Token(77, "edge")) == (TextDelta(Token(77, "edge"), ""),)


def test_nothing_is_released_after_a_stop_string() -> None:
    detokenizer = Detokenizer(Table([b"a", b"b"]), ["a"])  # type: ignore[arg-type]
    assert [detokenizer.push(Token(id, "edge")) for id in (0, 1)] == [(), ()]
    assert detokenizer.finish() == ()


@pytest.mark.parametrize(
    ("text", "stop", "length"), [("aab", "abc", 2), ("aa", "aaa", 2), ("abc", "abc", 0), ("", "a", 0)]
)
def test_overlap(text: str, stop: str, length: int) -> None:
    assert overlap(text, stop) == length


@pytest.fixture(scope="module")
def sentencepiece() -> Tokenizer:
    return gguf_tokenizer.read(gguf_fields())


def streamed(tokenizer: Tokenizer, ids: list[int], continues: bool = False) -> list[str]:
    detokenizer = Detokenizer(tokenizer, continues=continues)
    steps = [detokenizer.push(Token(id, "edge")) for id in ids]
    return ["".join(delta.text for delta in step) for step in [*steps, detokenizer.finish()]]


@given(ids=st.lists(st.integers(3, len(tiny_pieces().tokens) - 1) | st.sampled_from([0, 1]), max_size=20))
@settings(max_examples=300)
def test_a_stream_of_sentencepiece_is_what_decode_gives(sentencepiece: Tokenizer, ids: list[int]) -> None:
    assert "".join(streamed(sentencepiece, ids)) == sentencepiece.decode(ids)


@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁<"), max_size=30))
def test_a_stream_of_sentencepiece_is_the_text_and_what_the_library_gives(sentencepiece: Tokenizer, text: str) -> None:
    ids = sentencepiece.encode(text)
    pieces = streamed(sentencepiece, ids)
    assert "".join(pieces) == tokenizer_json().decode(ids) == text
    assert not any("\ufffd" in piece for piece in pieces) or "\ufffd" in text


def test_an_answer_begins_without_a_space_and_a_continuation_with_it(sentencepiece: Tokenizer) -> None:
    ids = sentencepiece.encode("the fox 🎉")[1:]
    assert "".join(streamed(sentencepiece, ids)) == "the fox 🎉"
    assert "".join(streamed(sentencepiece, ids, continues=True)) == " the fox 🎉"
    assert "".join(streamed(sentencepiece, [1, *ids])) == "the fox 🎉", "a special token is not the first"


class Events:
    """Tokens 0, 1, ... and a summary. `closed` says whether the generator was closed."""

    def __init__(self, count: int, summary: bool = True) -> None:
        self.closed = False
        self.count = count
        self.summary = summary

    def __call__(self) -> Iterator[Token | Summary]:
        try:
            for id in range(self.count):
                yield Token(id, "draft" if id % 2 else "edge")
            if self.summary:
                yield Summary("length", 1, self.count, "verify", "")
        finally:
            self.closed = True


def test_the_last_event_is_the_outcome() -> None:
    events = Events(3)
    *_, last = detokenize(events(), Detokenizer(Table([b"a", b"b", b"c"])))  # type: ignore[arg-type]
    assert isinstance(last, Outcome)
    assert (last.finish, last.tokens, last.drafted) == ("length", 3, 1)
    assert last.summary
    assert events.closed


def test_a_stop_string_closes_the_generator_before_the_outcome() -> None:
    events = Events(3)
    for event in detokenize(events(), Detokenizer(Table([b"a", b"b", b"c"]), ["b"])):  # type: ignore[arg-type]
        if isinstance(event, Outcome):
            assert events.closed
    assert event == Outcome("stop", 2, 1, None)


def test_a_stop_string_in_what_the_end_releases_counts() -> None:
    *_, last = detokenize(Events(1)(), Detokenizer(Table([b"a\xe2"]), ["\ufffd"]))  # type: ignore[arg-type]
    assert isinstance(last, Outcome)
    assert last.finish == "stop"
    assert last.summary


def test_closing_closes_the_generator() -> None:
    events = Events(3)
    reader = detokenize(events(), Detokenizer(Table([b"a", b"b", b"c"])))  # type: ignore[arg-type]
    next(reader)
    reader.close()  # type: ignore[attr-defined]
    assert events.closed


def test_a_generator_without_a_summary_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="summary"):
        list(detokenize(Events(1, summary=False)(), Detokenizer(Table([b"a"]))))  # type: ignore[arg-type]
    assert list(detokenize(iter([Summary("stop", 1, 0, "edge", "")]), Detokenizer(Table([]))))  # type: ignore[arg-type]
