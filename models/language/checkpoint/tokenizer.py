"""Convert text to token ids and back: byte-level BPE of the `tokenizers` library, special tokens, chat template.

    text ── encode ──> ids        messages ── chat ──> ids
    text <── decode ── ids        bytes of one token <── token_bytes ── id ;  TextStream: bytes to whole characters

A token's bytes can be part of a character. SentencePiece (Llama 2) is not supported. Knows nothing about models.
"""

from __future__ import annotations

import codecs
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models

from isthmus.models.errors import BundleError, InvalidInput
from isthmus.models.language.checkpoint.chat_template import ChatTemplate
from isthmus.models.language.checkpoint.huggingface import read_bytes, read_json

MAX_TOKENIZER_BYTES = 64 << 20  # Llama 3's tokenizer.json has 17 MB
END_TOKENS = ("<|im_end|>", "<|eot_id|>", "<|endoftext|>", "<|end_of_text|>")
NAMED_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")


@dataclass(frozen=True)
class Message:
    """One turn of a conversation; `role` is usually system, user or assistant."""

    role: str
    content: str


class Tokenizer:
    """`size`: tokens in the vocabulary; a model's embedding may have more rows, which stand for no token.

    `eos_ids`: every token that ends an answer.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        merges: Sequence[str],
        eos_ids: Iterable[object],
        template: ChatTemplate | None,
        unused: Iterable[int] = (),
    ) -> None:
        """`merges`: "left right" in order. `unused`: ids that stand for no text. Raises BundleError for invalid ids."""
        if not (isinstance(backend.model, models.BPE) and isinstance(backend.decoder, decoders.ByteLevel)):
            raise BundleError("tokenizer: not a byte-level BPE, the only supported kind")
        backend.no_truncation()
        backend.no_padding()
        added = backend.get_added_tokens_decoder()
        self._backend = backend
        self._vocabulary = backend.get_vocab(with_added_tokens=True)
        self._added = {id: token.content for id, token in added.items()}
        self._special = frozenset(id for id, token in added.items() if token.special) | frozenset(unused)
        self._unused = frozenset(unused)
        self._merges_digest = hashlib.sha256("\0".join(merges).encode()).digest()
        self._template = template
        self.size = max(self._vocabulary.values(), default=-1) + 1
        self.eos_ids = self._end_ids(eos_ids)

    @classmethod
    def open(cls, folder: Path) -> Tokenizer:
        """Read the tokenizer of a Hugging Face folder. Raises BundleError."""
        raw = read_bytes(folder / "tokenizer.json", MAX_TOKENIZER_BYTES)
        try:
            backend = tokenizers.Tokenizer.from_str(raw.decode())
            merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in json.loads(raw)["model"]["merges"]]
        except Exception as error:  # the library raises no narrower class
            raise BundleError(f"tokenizer.json: {str(error)[:200]}") from error
        names, source = _tokenizer_config(folder)
        return cls(
            backend,
            merges=merges,
            eos_ids=[*_configured_ends(folder), backend.token_to_id(names.get("eos_token", ""))],
            template=None if source is None else ChatTemplate(source, names),
        )

    @cached_property
    def fingerprint(self) -> bytes:
        """SHA-256, 32 bytes, over tokens with their ids, and merges: the same for GGUF and Hugging Face files."""
        entries = sorted((id, token) for token, id in self._vocabulary.items() if id not in self._unused)
        lines = (f"{id} {id in self._special:d} {token}\0" for id, token in entries)
        return hashlib.sha256("".join(lines).encode() + self._merges_digest).digest()

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """The ids of `text`, with a beginning-of-text token if the model's settings ask for one.

        `special`: text such as <|im_end|> becomes that token; False keeps it as ordinary text, for untrusted input.
        Bytes that are missing from the vocabulary are dropped (SmolLM2's lacks 21, all rare controls or part of no
        assigned character). Raises InvalidInput when `text` holds a lone surrogate.
        """
        backend = self._backend if special else self._literal
        return backend.encode(_encodable(text), add_special_tokens=True).ids

    def chat(self, messages: Sequence[Message]) -> list[int]:
        """The ids of a conversation up to where the assistant's answer begins.

        Special tokens written in a message's content are encoded as such, as in transformers. Raises InvalidInput
        when there is no template, when it rejects the messages, and for a lone surrogate.
        """
        if self._template is None:
            raise InvalidInput("this model has no chat template")
        text = self._template.render([asdict(message) for message in messages])
        return self._backend.encode(_encodable(text), add_special_tokens=False).ids

    def token_bytes(self, id: int) -> bytes:
        """A token's bytes in UTF-8, which can be part of a character; b"" for special tokens.

        Raises InvalidInput for an id outside 0 to `size` - 1.
        """
        if self.special(id):
            return b""
        if id in self._added:
            return self._added[id].encode()
        token = self._backend.id_to_token(id) or ""  # "": a gap between ids
        try:
            return bytes(BYTES[character] for character in token)
        except KeyError:
            return token.encode()

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids` without special tokens; invalid UTF-8 becomes U+FFFD. Raises InvalidInput."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", errors="replace")

    def special(self, id: int) -> bool:
        """Whether a token is a control token and not text. Raises InvalidInput for an id out of range."""
        if not 0 <= id < self.size:
            raise InvalidInput(f"token id {id}, expected 0 to {self.size - 1}")
        return id in self._special

    @cached_property
    def _literal(self) -> tokenizers.Tokenizer:
        """The same tokenizer without special tokens. The setting belongs to the whole object, hence a second one."""
        literal = tokenizers.Tokenizer.from_str(self._backend.to_str())
        literal.encode_special_tokens = True
        return literal

    def _end_ids(self, ids: Iterable[object]) -> frozenset[int]:
        named = (self._vocabulary.get(token) for token in END_TOKENS)
        found = {id for id in named if id in self._special}
        for id in ids:
            if type(id) is int and 0 <= id < self.size:
                found.add(id)
            elif id is not None:
                raise BundleError(f"tokenizer: end-of-text id {str(id)[:40]}, expected 0 to {self.size - 1}")
        return frozenset(id for id in found if id is not None)


class TextStream:
    """Decodes the bytes of tokens incrementally, character by character; invalid UTF-8 becomes U+FFFD."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: bytes) -> str:
        """The characters that `token` completes, possibly none."""
        return self._decoder.decode(token)

    def finish(self) -> str:
        """Decode an incomplete last character as U+FFFD and reset for the next text."""
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return rest


def byte_alphabet() -> dict[str, int]:
    """Characters of byte-level BPE and the bytes that they stand for (GPT-2, `bytes_to_unicode`)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    shifted = {chr(256 + index): byte for index, byte in enumerate(others)}
    return {**{chr(byte): byte for byte in printable}, **shifted}


BYTES = byte_alphabet()


def _encodable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidInput(f"text holds a lone surrogate at character {error.start}") from error
    return text


def _tokenizer_config(folder: Path) -> tuple[dict[str, str], str | None]:
    """Named special tokens with their text, and the source of the chat template, if there is one."""
    content: dict[str, Any] = {}
    if (folder / "tokenizer_config.json").exists():
        content = read_json(folder / "tokenizer_config.json")
    tokens = {name: content.get(name) for name in NAMED_TOKENS}
    texts = {name: token.get("content") if isinstance(token, dict) else token for name, token in tokens.items()}
    names = {name: text for name, text in texts.items() if isinstance(text, str)}
    template = content.get("chat_template")
    if (path := folder / "chat_template.jinja").exists():
        template = read_bytes(path, MAX_TOKENIZER_BYTES).decode("utf-8", errors="replace")
    if isinstance(template, list):  # several named templates, in older checkpoints
        named = [entry for entry in template if isinstance(entry, dict) and entry.get("name") == "default"]
        template = named[0].get("template") if named else None
    return names, template if isinstance(template, str) else None


def _configured_ends(folder: Path) -> list[object]:
    """The eos_token_id of config.json and generation_config.json: one id, several or none."""
    ends: list[object] = []
    for name in ("config.json", "generation_config.json"):
        value = read_json(folder / name).get("eos_token_id") if (folder / name).exists() else None
        ends += value if isinstance(value, list) else [value]
    return ends
