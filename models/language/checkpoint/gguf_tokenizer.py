"""Build a tokenizer of the `tokenizers` library from the keys of a GGUF header: byte-level BPE or SentencePiece.

GGUF only names the pre-tokenizer (`tokenizer.ggml.pre`) of a byte-level BPE; this module defines those of the supported
names (llama.cpp, `llm_tokenizer_bpe` in src/llama-vocab.cpp). Knows nothing about files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from isthmus.models.errors import BundleError
from isthmus.models.language.checkpoint import generation, sentencepiece
from isthmus.models.language.checkpoint.chat_template import ChatTemplate
from isthmus.models.language.checkpoint.sentencepiece import NORMAL, UNKNOWN, UNUSED, USER_DEFINED, Pieces
from isthmus.models.language.checkpoint.tokenizer import Tokenizer
from isthmus.models.language.checkpoint.tokenizer_files import NAMED_TOKENS, library_errors
from isthmus.models.messages import Sampling

CONTROL = (sentencepiece.CONTROL, UNKNOWN)  # types of special tokens
LLAMA3_NAMES = ("llama-bpe", "llama3", "llama-v3")  # of the same rule, by different versions of the converter
PRE = ("smollm", "gpt-2", *LLAMA3_NAMES, "qwen2")  # names of pre-tokenizers
SENTENCEPIECE_DEFAULTS = {"tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2}  # llama.cpp's
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
GGUF_NAMES = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}


def read(fields: Mapping[str, Any], sampling: Sampling | None = None) -> Tokenizer:
    """`fields`: the keys of a GGUF header. `sampling`: in place of what they recommend.

    Raises BundleError naming what is missing or unsupported.
    """
    if (kind := fields.get("tokenizer.ggml.model")) not in ("gpt2", "llama"):
        raise BundleError(
            f"GGUF tokenizer: tokenizer.ggml.model is {str(kind)[:40]}, this program reads gpt2 (byte-level BPE) and "
            "llama (SentencePiece)"
        )
    if kind == "llama":
        fields = {**SENTENCEPIECE_DEFAULTS, **fields}
    tokens = _list(fields, "tokens", str)
    types = _list(fields, "token_type", int)
    if len(types) != len(tokens) or len(set(tokens)) != len(tokens):
        raise BundleError(f"GGUF tokenizer: {len(tokens)} tokens, {len(types)} types, expected as many, no duplicates")
    with library_errors("GGUF tokenizer"):
        backend, merges = sentencepiece_bpe(fields) if kind == "llama" else byte_level_bpe(fields)
    return Tokenizer(
        backend,
        merges=merges,
        eos_ids=[fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")],
        template=_template(fields, tokens),
        bos=bos_ids(tokens, fields),
        unused=[id for id, kind in enumerate(types) if kind == UNUSED],
        sampling=generation.gguf_sampling(fields) if sampling is None else sampling,
    )


def sentencepiece_bpe(fields: Mapping[str, Any]) -> tuple[tokenizers.Tokenizer, list[str]]:
    """A tokenizer and its rules. Raises BundleError; the library may raise any error."""
    tokens, types = _list(fields, "tokens", str), _list(fields, "token_type", int)
    space_prefix = fields.get("tokenizer.ggml.add_space_prefix", True) is not False
    pieces = Pieces(tokens, _list(fields, "scores", float), types, space_prefix)
    return sentencepiece.build(pieces), pieces.rules()


def byte_level_bpe(fields: Mapping[str, Any]) -> tuple[tokenizers.Tokenizer, list[str]]:
    """A tokenizer and its merges. Raises BundleError; the library may raise any error."""
    if (pre := fields.get("tokenizer.ggml.pre", "default")) == "default":
        raise BundleError(
            "GGUF tokenizer: tokenizer.ggml.pre is missing or default, so it is unknown where text is cut into words; "
            f"expected {', '.join(PRE)}; convert the model again, or name the rule of its tokenizer: "
            "gguf-new-metadata --pre-tokenizer NAME OLD.gguf NEW.gguf"
        )
    tokens, types = _list(fields, "tokens", str), _list(fields, "token_type", int)
    bare = all(len(token) == 1 for token, kind in zip(tokens, types, strict=True) if kind == NORMAL)
    merges = [] if bare else _list(fields, "merges", str)  # GGUF writers omit an empty array
    return build(tokens, types, merges, str(pre)), merges


def build(tokens: Sequence[str], types: Sequence[int], merges: Sequence[str], pre: str) -> tokenizers.Tokenizer:
    """Byte-level BPE with special tokens. Raises BundleError for an unknown `pre`; the library may raise any error."""
    vocabulary = {token: id for id, token in enumerate(tokens)}
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    model = models.BPE(vocab=vocabulary, merges=pairs, ignore_merges=pre in LLAMA3_NAMES)
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizer(pre)
    backend.decoder = decoders.ByteLevel()
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()
    added = ((token, kind) for token, kind in zip(tokens, types, strict=True) if kind in (*CONTROL, USER_DEFINED))
    backend.add_tokens([AddedToken(token, normalized=False, special=kind in CONTROL) for token, kind in added])
    return backend


def pre_tokenizer(name: str) -> pre_tokenizers.PreTokenizer:
    """The pre-tokenizer that splits text into words for BPE. Raises BundleError for an unknown name."""
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if name == "gpt-2":
        return gpt2
    if name == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2])
    if name in (*LLAMA3_NAMES, "qwen2"):
        words = pre_tokenizers.Split(Regex(QWEN2 if name == "qwen2" else LLAMA3), "isolated")
        return pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    raise BundleError(f"GGUF tokenizer: tokenizer.ggml.pre is {name[:40]}, this program reads {', '.join(PRE)}")


def bos_ids(tokens: Sequence[str], fields: Mapping[str, Any]) -> list[int]:
    """A beginning-of-text token before every text if the file says so; Llama's, where it is implied."""
    implied = fields["tokenizer.ggml.model"] == "llama" or fields.get("tokenizer.ggml.pre") in LLAMA3_NAMES
    if not fields.get("tokenizer.ggml.add_bos_token", implied):
        return []
    if (bos := _named(fields, tokens, "bos_token")) is None:
        raise BundleError("GGUF tokenizer: add_bos_token without a bos_token_id in the vocabulary")
    return [tokens.index(bos)]


def _template(fields: Mapping[str, Any], tokens: Sequence[str]) -> ChatTemplate | None:
    source = fields.get("tokenizer.chat_template")
    if not isinstance(source, str):
        return None
    named = {name: _named(fields, tokens, name) for name in NAMED_TOKENS}
    return ChatTemplate(source, {name: token for name, token in named.items() if token is not None})


def _named(fields: Mapping[str, Any], tokens: Sequence[str], name: str) -> str | None:
    id = fields.get(f"tokenizer.ggml.{GGUF_NAMES[name]}_token_id")
    return tokens[id] if type(id) is int and 0 <= id < len(tokens) else None


def _list(fields: Mapping[str, Any], name: str, kind: type) -> list[Any]:
    values = fields.get(f"tokenizer.ggml.{name}")
    if not isinstance(values, list) or not all(type(value) is kind for value in values):
        raise BundleError(f"GGUF tokenizer: tokenizer.ggml.{name} is missing or not an array of {kind.__name__}")
    return values
