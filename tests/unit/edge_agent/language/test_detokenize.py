from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.edge_agent.language.detokenize import Detokenizer, Outcome, Shown, overlap, read
from isthmus.edge_agent.language.request import Summary, Token

END = 1_000_000


class Table:
    """A tokenizer whose tokens are these pieces."""

    eos_ids = frozenset({END})

    def __init__(self, pieces: list[bytes]) -> None:
        self.pieces = pieces
        self.size = len(pieces)

    def token_bytes(self, id: int) -> bytes:
        return self.pieces[id]


def shown(pieces: list[bytes], stops: list[str]) -> tuple[list[list[Shown]], Detokenizer]:
    """What each token lets out, and last what the end does."""
    text = Detokenizer(Table(pieces), stops)  # type: ignore[arg-type]
    steps = [list(text.push(Token(id, "edge"))) for id in range(len(pieces))]
    return [*steps, list(text.finish())], text


def texts(pieces: list[bytes], *stops: str) -> list[str]:
    return ["".join(one.text for one in step) for step in shown(pieces, list(stops))[0]]


def of_whole(data: bytes, stops: list[str]) -> str:
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
def test_text_goes_out_as_early_as_it_may(pieces: list[bytes], stops: list[str], expected: list[str]) -> None:
    assert texts(pieces, *stops) == expected


@given(
    st.lists(st.binary(max_size=5) | st.text("abé€", max_size=4).map(str.encode), max_size=12),
    st.lists(st.text("abé€\ufffd", min_size=1, max_size=4), max_size=4),
)
def test_the_split_into_tokens_does_not_matter(pieces: list[bytes], stops: list[str]) -> None:
    steps, text = shown(pieces, stops)
    whole = of_whole(b"".join(pieces), stops)
    assert "".join(one.text for step in steps for one in step) == whole
    assert text.stopped == (whole != b"".join(pieces).decode("utf-8", "replace"))


@given(st.lists(st.binary(min_size=1, max_size=4), max_size=10))
def test_without_stop_strings_every_token_is_shown_once_and_in_order(pieces: list[bytes]) -> None:
    tokens = [one.token.id for step in shown(pieces, [])[0] for one in step if one.token]
    assert tokens == list(range(len(pieces)))


def test_a_token_goes_out_together_with_its_text() -> None:
    steps, _ = shown([b"a", b"\xc3", b"\xa9", b"!"], [])
    assert [[(one.token.id, one.text) for one in step if one.token] for step in steps] == [
        [(0, "a")],
        [],
        [(1, ""), (2, "é")],
        [(3, "!")],
        [],
    ]


def test_tokens_inside_a_stop_string_are_not_shown() -> None:
    steps, _ = shown([b"ab", b"cS", b"TO", b"P"], ["STOP"])
    assert [(one.token.id, one.text) for step in steps for one in step if one.token] == [(0, "ab"), (1, "c")]


def test_the_end_of_text_and_rows_beyond_the_vocabulary_have_no_text() -> None:
    text = Detokenizer(Table([b"a"]))  # type: ignore[arg-type]
    assert text.push(Token(END, "edge")) == ()
    assert text.push(Token(77, "edge")) == (Shown(Token(77, "edge"), ""),)


def test_nothing_comes_behind_a_stop_string() -> None:
    text = Detokenizer(Table([b"a", b"b"]), ["a"])  # type: ignore[arg-type]
    assert [text.push(Token(id, "edge")) for id in (0, 1)] == [(), ()]
    assert text.finish() == ()


@pytest.mark.parametrize(
    ("text", "stop", "length"), [("aab", "abc", 2), ("aa", "aaa", 2), ("abc", "abc", 0), ("", "a", 0)]
)
def test_overlap(text: str, stop: str, length: int) -> None:
    assert overlap(text, stop) == length


class Events:
    """Tokens 0, 1, ... and a summary, which remember being closed."""

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


def test_reading_ends_with_the_summary() -> None:
    events = Events(3)
    *_, last = read(events(), Detokenizer(Table([b"a", b"b", b"c"])))  # type: ignore[arg-type]
    assert isinstance(last, Outcome)
    assert (last.finish, last.tokens, last.drafted) == ("length", 3, 1)
    assert last.summary
    assert events.closed


def test_reading_closes_the_loop_at_a_stop_string_before_it_says_so() -> None:
    events = Events(3)
    for step in read(events(), Detokenizer(Table([b"a", b"b", b"c"]), ["b"])):  # type: ignore[arg-type]
        if isinstance(step, Outcome):
            assert events.closed
    assert step == Outcome("stop", 2, 1, None)


def test_a_stop_string_in_what_the_end_lets_out_counts() -> None:
    *_, last = read(Events(1)(), Detokenizer(Table([b"a\xe2"]), ["\ufffd"]))  # type: ignore[arg-type]
    assert isinstance(last, Outcome)
    assert last.finish == "stop"
    assert last.summary


def test_closing_the_reader_closes_the_loop() -> None:
    events = Events(3)
    reader = read(events(), Detokenizer(Table([b"a", b"b", b"c"])))  # type: ignore[arg-type]
    next(reader)
    reader.close()  # type: ignore[attr-defined]
    assert events.closed


def test_a_loop_without_a_summary_is_a_defect() -> None:
    with pytest.raises(RuntimeError, match="summary"):
        list(read(Events(1, summary=False)(), Detokenizer(Table([b"a"]))))  # type: ignore[arg-type]
    assert list(read(iter([Summary("stop", 1, 0, "edge", "")]), Detokenizer(Table([]))))  # type: ignore[arg-type]
