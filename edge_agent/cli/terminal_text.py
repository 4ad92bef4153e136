"""Untrusted text on a terminal: control characters become visible escapes. Knows nothing about colours or layout."""

from __future__ import annotations

import unicodedata

BIDIRECTIONAL = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"  # can make one line read as another


def escape_control(text: str) -> str:
    """The text with control characters other than line feed and tab as escapes such as \\x1b."""
    return "".join(escape(char) if needs_escape(char) else char for char in text)


def needs_escape(char: str) -> bool:
    return (unicodedata.category(char) in ("Cc", "Cs") and char not in "\n\t") or char in BIDIRECTIONAL


def escape(char: str) -> str:
    return f"\\x{ord(char):02x}" if ord(char) < 0x100 else f"\\u{ord(char):04x}"
