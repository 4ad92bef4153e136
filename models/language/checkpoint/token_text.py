"""How the tokens of a vocabulary stand for text, and the text of a sequence of tokens, incrementally.

    byte-level BPE (GPT-2, Llama 3, Qwen)      Ġcaf Ã ©          each character is one byte
    SentencePiece (Llama 2, Mistral)           ▁caf <0xC3> <0xA9>  ▁ is a space, <0x..> is one byte

A text of SentencePiece begins with a space that its tokenizer adds and its decoder takes away; inside a text a token's
space stays. Bytes that are not UTF-8 become U+FFFD. Knows nothing about vocabularies, files or models.
"""

from __future__ import annotations

import codecs
import json
import re
from dataclasses import dataclass
from typing import Any

import tokenizers

from isthmus.models.errors import BundleError

SPACE = "▁"  # U+2581
BYTE = re.compile("<0x([0-9A-Fa-f]{2})>", re.ASCII)
EVERY = 1 << 30  # leading spaces
REPLACE = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}


@dataclass(frozen=True, slots=True)
class TokenText:
    """Turns a token into its bytes, as the decoder of the `tokenizers` library does.

    `leading_spaces`: at most as many at the start of a text's first token are not part of the text.
    """

    byte_level: bool = False
    spaces: bool = False  # SPACE stands for a space
    byte_tokens: bool = False  # <0x41> stands for the byte 0x41
    leading_spaces: int = 0

    def bytes_of(self, token: str) -> bytes:
        """UTF-8, possibly part of a character."""
        if self.byte_level:
            try:
                return bytes(BYTES[character] for character in token)
            except KeyError:
                return token.encode()
        if self.byte_tokens and (match := BYTE.fullmatch(token)):
            return bytes([int(match[1], 16)])
        return (token.replace(SPACE, " ") if self.spaces else token).encode()


def read_decoder(backend: tokenizers.Tokenizer) -> TokenText:
    """What a tokenizer's decoder does. Raises BundleError naming a step of it that is not supported."""
    config: dict[str, Any] = json.loads(backend.decoder.__getstate__()) if backend.decoder else {"type": "none"}
    steps: list[dict[str, Any]] = config["decoders"] if config["type"] == "Sequence" else [config]
    kinds = [str(step["type"]) for step in steps]
    if kinds == ["ByteLevel"]:
        return TokenText(byte_level=True)
    if backend.pre_tokenizer and b'"ByteLevel"' in backend.pre_tokenizer.__getstate__():
        raise BundleError(f"tokenizer: decoder {', '.join(kinds)[:100]} after a pre-tokenizer of byte-level BPE")
    leading_spaces, unsupported = 0, set(kinds) - {"ByteFallback", "Fuse"}
    for index, step in enumerate(steps):
        if step == REPLACE:
            unsupported.discard("Replace")
        elif step["type"] == "Metaspace" and step["replacement"] == SPACE:
            leading_spaces = 0 if step["prepend_scheme"] == "never" else EVERY
            unsupported.discard("Metaspace")
        elif step["type"] == "Strip" and stripped(step) <= 1 and "Fuse" in kinds[:index]:
            leading_spaces = stripped(step)
            unsupported.discard("Strip")
    if unsupported or len(set(kinds)) != len(kinds):
        names = ", ".join(kinds)[:100]
        raise BundleError(f"tokenizer: decoder {names}, this program reads those of byte-level BPE and SentencePiece")
    return TokenText(False, "Replace" in kinds or "Metaspace" in kinds, "ByteFallback" in kinds, leading_spaces)


def stripped(step: dict[str, Any]) -> int:
    """Leading spaces that the library's Strip takes away; a large number for anything else that it does."""
    return int(step["start"]) if step["content"] == " " and step["stop"] == 0 else EVERY


class TextStream:
    """Decodes the bytes of tokens incrementally, character by character; invalid UTF-8 becomes U+FFFD.

    `leading_spaces`: of the first token that has bytes, at most as many are left out.
    """

    def __init__(self, leading_spaces: int = 0) -> None:
        self._leading_spaces = self._skip = leading_spaces
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: bytes) -> str:
        """The characters that `token` completes, possibly none."""
        if token and self._skip:
            token = token[min(len(token) - len(token.lstrip(b" ")), self._skip) :]
            self._skip = 0
        return self._decoder.decode(token)

    def finish(self) -> str:
        """Decode an incomplete last character as U+FFFD and reset for the next text."""
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        self._skip = self._leading_spaces
        return rest


def byte_alphabet() -> dict[str, int]:
    """Characters of byte-level BPE and the bytes that they stand for (GPT-2, `bytes_to_unicode`)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    shifted = {chr(256 + index): byte for index, byte in enumerate(others)}
    return {**{chr(byte): byte for byte in printable}, **shifted}


BYTES = byte_alphabet()
