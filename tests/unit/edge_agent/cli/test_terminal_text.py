from __future__ import annotations

import pytest

from isthmus.edge_agent.cli.terminal_text import BIDIRECTIONAL, escape_control


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("a\tb\nc é 👩‍🚀", "a\tb\nc é 👩‍🚀"),
        ("\x1b[2J\x07\r\x00\x7f", "\\x1b[2J\\x07\\x0d\\x00\\x7f"),
        ("\x9b31m", "\\x9b31m"),
        ("safe\u202etxt", "safe\\u202etxt"),
    ],
)
def test_control_characters_are_escaped(text: str, escaped: str) -> None:
    assert escape_control(text) == escaped


def test_every_control_character_is_escaped() -> None:
    control = "".join(map(chr, [*range(9), *range(11, 32), *range(127, 160)])) + BIDIRECTIONAL
    assert not set(escape_control(control)) & set(control)
