"""Convert text to token ids and back: BPE or unigram of the `tokenizers` library, special tokens, chat template.

    text ── encode ──> ids        messages ── chat ──> ids
    text <── decode ── ids        bytes of one token <── token_bytes ── id

A token's bytes can be part of a character: `token_text.TextStream` makes text of them. Knows nothing about models.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from hashlib import sha256
from pathlib import Path

import tokenizers
from tokenizers import models

from isthmus.models.errors import BundleError, ContextExceeded, InvalidInput
from isthmus.models.language.checkpoint import generation, tokenizer_format
from isthmus.models.language.checkpoint.chat_template import ChatTemplate
from isthmus.models.language.checkpoint.huggingface import read_bytes
from isthmus.models.language.checkpoint.token_text import TextStream, read_decoder
from isthmus.models.language.checkpoint.tokenizer_files import (
    configured_ends,
    library_errors,
    named_tokens,
    read_sentencepiece,
    read_tokenizer_json,
    template_source,
    tokenizer_config,
)
from isthmus.models.language.checkpoint.tokenizer_format import StoredSampling, StoredTemplate
from isthmus.models.language.checkpoint.tool_format import Message as Message
from isthmus.models.language.checkpoint.tool_format import Tool
from isthmus.models.language.checkpoint.weights import MAX_VOCAB
from isthmus.models.messages import MAX_TOKENIZER_BYTES, Sampling

MAX_FIRST = 16  # published models put one token before every text
JSON, SENTENCEPIECE = "tokenizer.json", "tokenizer.model"
END_TOKENS = ("<|im_end|>", "<|eot_id|>", "<|endoftext|>", "<|end_of_text|>")


class Tokenizer:
    """`size`: tokens in the vocabulary; a model's embedding may have more rows, which stand for no token.

    `eos_ids`: every token that ends an answer. `sampling`: what the model's makers recommend.
    `leading_spaces`: at most as many at the start of a text's first token are not part of the text.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        merges: Sequence[str] | bytes,
        eos_ids: Iterable[object],
        template: ChatTemplate | None,
        bos: Sequence[int] | None = None,
        unused: Iterable[int] = (),
        sampling: Sampling = generation.UNSTATED,
    ) -> None:
        """`merges`: the rules of the model, in order, or their digest. `bos`: ids before every text, None: those that
        `backend` adds. `unused`: ids that stand for no text. Raises BundleError for invalid ids.
        """
        if not isinstance(backend.model, models.BPE | models.Unigram):
            raise BundleError(f"tokenizer: {type(backend.model).__name__}, this program reads BPE and Unigram")
        self._text = read_decoder(backend)
        backend.no_truncation()
        backend.no_padding()
        added = backend.get_added_tokens_decoder()
        self._backend = backend
        self._vocabulary = backend.get_vocab(with_added_tokens=True)
        self._added = {id: token.content for id, token in added.items()}
        self._special = frozenset(id for id, token in added.items() if token.special) | frozenset(unused)
        self._unused = frozenset(unused)
        self._bos = first_ids(backend) if bos is None else list(bos)
        self._merges_digest = merges if isinstance(merges, bytes) else sha256("\0".join(merges).encode()).digest()
        self._template = template
        self.size = max(self._vocabulary.values(), default=-1) + 1
        if len(self._bos) > MAX_FIRST:
            raise BundleError(f"tokenizer: {len(self._bos)} tokens before every text, at most {MAX_FIRST}")
        if self.size > MAX_VOCAB:
            raise BundleError(f"tokenizer: token id {self.size - 1}, at most {MAX_VOCAB - 1}")
        self.eos_ids = self._end_ids(eos_ids)
        self.sampling = sampling
        self.leading_spaces = self._text.leading_spaces

    @classmethod
    def open(cls, folder: Path) -> Tokenizer:
        """Read the tokenizer of a Hugging Face folder: tokenizer.json, or tokenizer.model. Raises BundleError."""
        legacy = not (folder / JSON).exists() and (folder / SENTENCEPIECE).exists()
        name = SENTENCEPIECE if legacy else JSON
        raw = read_bytes(folder / name, MAX_TOKENIZER_BYTES)
        with library_errors(name):
            backend, merges = read_sentencepiece(folder, raw) if legacy else read_tokenizer_json(raw)
        content = tokenizer_config(folder)
        names, source = named_tokens(content), template_source(folder, content)
        bos, adds = backend.token_to_id(names.get("bos_token", "")), content.get("add_bos_token", legacy or None)
        return cls(
            backend,
            merges=merges,
            eos_ids=[*configured_ends(folder), backend.token_to_id(names.get("eos_token", ""))],
            template=None if source is None else ChatTemplate(source, names),
            bos=None if not isinstance(adds, bool) else [bos] if adds and bos is not None else [],
            sampling=generation.folder_sampling(folder),
        )

    @classmethod
    def from_bytes(cls, raw: bytes) -> Tokenizer:
        """The inverse of `to_bytes`; `raw` may come from anyone. Raises BundleError for anything else."""
        header, backend = tokenizer_format.unpack(raw)
        template = header.template
        tokenizer = cls(
            backend,
            merges=bytes.fromhex(header.merges),
            eos_ids=header.eos,
            template=None if template is None else ChatTemplate(template.source, template.tokens),
            bos=header.bos,
            unused=header.unused,
            sampling=generation.sampling_of(dict(header.sampling), "temperature", "top_p", "tokenizer"),
        )
        tokenizer.fingerprint = sha256(raw).digest()
        return tokenizer

    def to_bytes(self) -> bytes:
        """Everything that `encode`, `chat` and `decode` go by, at most 64 MiB, in the format of `tokenizer_format`.

        The same bytes for the same files. Raises BundleError for a tokenizer that is larger.
        """
        template = self._template
        header = tokenizer_format.Header(
            format=1,
            bos=self._bos,
            eos=sorted(self.eos_ids),
            unused=sorted(self._unused),
            merges=self._merges_digest.hex(),
            sampling=StoredSampling(temperature=self.sampling.temperature, top_p=self.sampling.top_p),
            template=None if template is None else StoredTemplate(source=template.source, tokens=template.variables),
        )
        return tokenizer_format.pack(header, self._backend)

    @cached_property
    def fingerprint(self) -> bytes:
        """SHA-256, 32 bytes, of `to_bytes()`: equal where every text and conversation has the same ids."""
        return sha256(self.to_bytes()).digest()

    @cached_property
    def vocabulary(self) -> bytes:
        """SHA-256, 32 bytes, over tokens with their ids, and merges: equal where ids mean the same.

        The same for GGUF and Hugging Face files of one model, whatever their chat template.
        """
        entries = sorted((id, token) for token, id in self._vocabulary.items() if id not in self._unused)
        lines = (f"{id} {id in self._special:d} {token}\0" for id, token in entries)
        return sha256("".join(lines).encode() + self._merges_digest).digest()

    @cached_property
    def longest_token_bytes(self) -> int:
        """Bytes of the longest token, so that a text of n bytes has at least n / `longest_token_bytes` tokens."""
        sizes = [len(self.token_bytes(id)) for id in range(self.size)]
        return max(1, *sizes, *(len(content.encode()) for content in self._added.values()))

    def check_length(self, text: str, context: int) -> None:
        """Raises ContextExceeded for a text that has more than `context` tokens, whichever they are."""
        size = len(_encodable(text).encode())
        if size > context * self.longest_token_bytes:
            raise ContextExceeded(
                f"the prompt has {size} bytes, more than any {context} tokens have, which is the context of this model"
            )

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """The ids of `text`, with a beginning-of-text token if the model's settings ask for one.

        Never with an end-of-text token, whatever the settings: a prompt is to be continued.

        `special`: text such as <|im_end|> becomes that token; False keeps it as ordinary text, for untrusted input.
        Bytes that are missing from the vocabulary are dropped (SmolLM2's lacks 21, all rare controls or part of no
        assigned character). Raises InvalidInput when `text` holds a lone surrogate.
        """
        backend = self._backend if special else self._literal
        return self._bos + _ids(backend, text)

    def continuation(self, text: str) -> list[int]:
        """The ids of `text` as the rest of another. Raises InvalidInput when it holds a lone surrogate."""
        return _ids(self._literal, text)

    def chat(self, messages: Sequence[Message], context: int | None = None, tools: Sequence[Tool] = ()) -> list[int]:
        """The ids of a conversation up to where the assistant's answer begins, which may call `tools`.

        Special tokens written in a message's content are encoded as such, as in transformers. Raises InvalidInput
        when there is no template, when it rejects the messages, and for a lone surrogate; ContextExceeded, before the
        text is encoded, where it cannot have as few as `context` tokens.
        """
        if self._template is None:
            raise InvalidInput("this model has no chat template: it continues texts and cannot chat")
        text = self._template.render(messages, tools)
        if context is not None:
            self.check_length(text, context)
        return _ids(self._backend, text)

    def token_bytes(self, id: int) -> bytes:
        """A token's bytes in UTF-8, which can be part of a character; b"" for special tokens.

        Raises InvalidInput for an id outside 0 to `size` - 1.
        """
        if self.special(id):
            return b""
        if self._text.byte_level and id in self._added:
            return self._added[id].encode()
        return self._text.bytes_of(self._backend.id_to_token(id) or "")  # "": a gap between ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids` without special tokens; invalid UTF-8 becomes U+FFFD. Raises InvalidInput."""
        stream = TextStream(self.leading_spaces)
        return "".join(stream.push(self.token_bytes(id)) for id in ids) + stream.finish()

    def written(self, ids: Sequence[int]) -> bytes:
        """UTF-8 of a prompt with its special tokens by name, which a server that reads text makes `ids` of again.

        Without the beginning-of-text tokens that a server adds itself. Raises InvalidInput.
        """
        rest = list(ids[len(self._bos) :] if list(ids[: len(self._bos)]) == self._bos else ids)
        parts = [
            self._added[id].encode() if self.special(id) and id in self._added else self.token_bytes(id) for id in rest
        ]
        spaces = min(self.leading_spaces, len(parts[0]) - len(parts[0].lstrip(b" "))) if parts else 0
        return b"".join(parts)[spaces:]

    @property
    def has_template(self) -> bool:
        """Whether `chat` can render a conversation."""
        return self._template is not None

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


def _ids(backend: tokenizers.Tokenizer, text: str) -> list[int]:
    """A batch of one: `encode` holds Python's lock for as long as it computes, a batch leaves it to other threads."""
    with library_errors("tokenizer"):
        ids: list[int] = backend.encode_batch_fast([_encodable(text)], add_special_tokens=False)[0].ids
    return ids


def _encodable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidInput(f"text holds a lone surrogate at character {error.start}") from error
    return text


def first_ids(backend: tokenizers.Tokenizer) -> list[int]:
    """What a tokenizer's post-processor puts before a text."""
    with library_errors("tokenizer"):
        encoding = backend.encode("a")
    count = next((at for at, part in enumerate(encoding.sequence_ids) if part is not None), 0)
    return encoding.ids[:count]
