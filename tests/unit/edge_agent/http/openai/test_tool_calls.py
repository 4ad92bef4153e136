"""Calls in an answer's text, however it is cut into pieces."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.edge_agent.http.openai.tool_calls import Piece, ToolCallReader
from isthmus.models.language.checkpoint.tool_format import ToolCall

ADD = '{"name": "add", "arguments": {"a": 1}}'
TAGGED = f"<tool_call>\n{ADD}\n</tool_call>"


def read(text: str, size: int = 3, *, parallel: bool = True) -> list[Any]:
    """Text in one piece each, and calls as pairs of name and arguments."""
    reader = ToolCallReader({"add", "sub"}, parallel=parallel)
    pieces: list[Piece] = []
    for start in range(0, len(text), size):
        pieces += reader.push(text[start : start + size])
    found: list[Any] = []
    for piece in [*pieces, *reader.finish()]:
        if isinstance(piece, ToolCall):
            assert piece.id.startswith("call_")
            found.append((piece.name, json.loads(piece.arguments)))
        elif found and isinstance(found[-1], str):
            found[-1] += piece
        else:
            found.append(piece)
    return found


CALL = ("add", {"a": 1})
CASES: list[tuple[str, list[Any]]] = [
    ("", []),
    ("  two words \n", ["  two words \n"]),
    (TAGGED, [CALL]),
    (f"\n{TAGGED}\n{TAGGED}\n", [CALL, CALL]),
    (f"Let me see.\n\n{TAGGED}", ["Let me see.", CALL]),
    (f"{TAGGED} and then", [CALL, " and then"]),
    (f"<tool_call>{ADD}", [CALL]),
    (ADD, [CALL]),
    (f" [{ADD}, {ADD}]\n", [CALL, CALL]),
    ('{"name": "sub", "parameters": {}}', [("sub", {})]),
    ('{"name": "sub"}', [("sub", {})]),
    ('{"name": "add", "arguments": "{\\"a\\": 1}"}', [CALL]),
    (f"[thinking] {TAGGED}", ["[thinking]", CALL]),
    *(
        (text, [text])
        for text in (
            '{"name": "other", "arguments": {}}',
            '{"name": ["add"], "arguments": {}}',
            '{"name": "add", "arguments": [1]}',
            '{"name": "add", "arguments": "{"}',
            '{"name": "add", "arguments": {"a": NaN}}',
            '{"answer": 4}',
            "[]",
            "{broken",
            f"{ADD} and more",
            "<tool_call>\nadd(1)\n</tool_call>",
            "<tool_call>",
            "a < b <tool",
            "</tool_call>",
            "[" * 5000,
        )
    ),
]


@pytest.mark.parametrize(("text", "expected"), CASES)
@pytest.mark.parametrize("size", [1, 7, 100_000])
def test_text_and_calls(text: str, expected: list[Any], size: int) -> None:
    assert read(text, size) == expected


def test_what_follows_the_only_call_is_dropped() -> None:
    assert read(f"x {TAGGED}{TAGGED} y", parallel=False) == ["x", CALL]
    assert read(f"[{ADD}, {ADD}]", parallel=False) == [CALL]


def test_text_is_released_as_soon_as_it_cannot_be_part_of_a_call() -> None:
    reader = ToolCallReader({"add"})
    assert reader.push("a <") == ["a"]
    assert reader.push("b") == [" <b"]
    assert reader.push(f" {TAGGED}") != []


@given(st.lists(st.sampled_from(["<tool_call>", "</tool_call>", ADD, "{", "a", " ", "\n", "<", "add"]), max_size=12))
def test_pieces_do_not_matter(parts: list[str]) -> None:
    text = "".join(parts)
    assert read(text, 1) == read(text, 5) == read(text, len(text) + 1)
