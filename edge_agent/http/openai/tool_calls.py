"""Find tool calls in an answer's text, as it is generated.

    <tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>    anywhere (Hermes, Qwen, our own text format)
    {"name": "add", "parameters": {"a": 1}}                          or a list of these, as the whole answer (Llama 3,
                                                                     Mistral, calls by a grammar)

What looks like a call and is none, such as broken JSON or a function that is not there, is text. Text that was released
is never taken back, so that a stream and a whole answer are the same. Knows nothing about tokens or HTTP.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Set
from typing import Protocol

from pydantic_core import from_json

from isthmus.edge_agent.language.detokenize import overlap
from isthmus.models.language.checkpoint.tool_format import CLOSE, OPEN, ToolCall

Piece = str | ToolCall
ARGUMENTS = ("arguments", "parameters")


class AnswerReader(Protocol):
    def push(self, text: str) -> list[Piece]:
        """Add text; returns what can be released now."""

    def finish(self) -> list[Piece]:
        """End the answer; returns what was held back."""


class PlainReader:
    """Of an answer that calls nothing."""

    def push(self, text: str) -> list[Piece]:
        return [text] if text else []

    def finish(self) -> list[Piece]:
        return []


class ToolCallReader:
    """Splits the text of one answer into what is said and what is called."""

    def __init__(self, names: Set[str], *, parallel: bool = True) -> None:
        """`names`: of the functions that may be called. Not `parallel`: what follows the first call is dropped."""
        self._names, self._parallel = names, parallel
        self._held = ""
        self._said = False  # whether text was released
        self.called = False

    def push(self, text: str) -> list[Piece]:
        """Add text; returns what can be released now."""
        self._held += text
        start = self._held.find(OPEN)
        if start < 0 and self._may_be_call(self._held):
            return []
        pieces: list[Piece] = []
        while start >= 0 and (end := self._held.find(CLOSE, start)) >= 0:
            pieces += self._read(self._held[:start], self._held[start + len(OPEN) : end], CLOSE)
            self._held = self._held[end + len(CLOSE) :]
            start = self._held.find(OPEN)
        return [*pieces, *self._release()]

    def finish(self) -> list[Piece]:
        """End the answer; returns what was held back."""
        held, self._held = self._held, ""
        before, opening, body = held.partition(OPEN)
        if opening:
            return self._read(before, body, "")
        if self._may_be_call(held) and (calls := self._parsed(held)):
            return self._calls(calls)
        return self._say(held.rstrip() if self.called else held)

    def _may_be_call(self, text: str) -> bool:
        """Whether the whole answer so far may be the beginning of a call, or of several."""
        return not self._said and not self.called and text.lstrip()[:1] in ("{", "[")

    def _release(self) -> list[Piece]:
        """What cannot be part of a call, without the white space that may come before one."""
        start = self._held.find(OPEN)
        end = start if start >= 0 else len(self._held) - overlap(self._held, OPEN)
        end = len(self._held[:end].rstrip())
        text, self._held = self._held[:end], self._held[end:]
        return self._say(text)

    def _read(self, before: str, body: str, close: str) -> list[Piece]:
        """The text before a call, and the call; or all of it as text."""
        calls = self._parsed(body)
        if calls:
            return [*self._say(before.rstrip()), *self._calls(calls)]
        return self._say(f"{before}{OPEN}{body}{close}")

    def _say(self, text: str) -> list[Piece]:
        if not text or (self.called and not self._parallel):
            return []
        self._said = True
        return [text]

    def _calls(self, calls: list[ToolCall]) -> list[Piece]:
        if not self._parallel:
            calls = [] if self.called else calls[:1]
        self.called = True
        return list(calls)

    def _parsed(self, text: str) -> list[ToolCall]:
        """The calls that a text is; none where any part of it is something else."""
        try:
            value = from_json(text.strip(), allow_inf_nan=False)
        except ValueError:
            return []
        calls = [self._call(each) for each in (value if isinstance(value, list) else [value])]
        return [call for call in calls if call is not None] if all(calls) else []

    def _call(self, value: object) -> ToolCall | None:
        if not isinstance(value, dict):
            return None
        name = value.get("name")
        if not isinstance(name, str) or name not in self._names:
            return None
        given: object = next((value[key] for key in ARGUMENTS if key in value), {})
        if isinstance(given, str):
            try:
                given = from_json(given, allow_inf_nan=False)
            except ValueError:
                return None
        if not isinstance(given, dict):
            return None
        return ToolCall(f"call_{secrets.token_hex(12)}", name, json.dumps(given, ensure_ascii=False))
