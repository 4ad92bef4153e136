"""What the files of a Hugging Face folder say about its tokenizer.

    tokenizer.json | tokenizer.model, added_tokens.json         a tokenizer of the `tokenizers` library and its rules
    tokenizer_config.json, chat_template.jinja                  named tokens, chat template
    config.json, generation_config.json                         ids that end a text

Knows nothing about how a text is encoded.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tokenizers

from isthmus.models.errors import BundleError, IsthmusError
from isthmus.models.language.checkpoint import sentencepiece
from isthmus.models.language.checkpoint.huggingface import read_bytes, read_json
from isthmus.models.messages import MAX_TOKENIZER_BYTES

NAMED_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")


@contextmanager
def library_errors(where: str) -> Iterator[None]:
    """Raises BundleError for what the `tokenizers` library raises: no narrower class, and panics of its Rust code."""
    try:
        yield
    except IsthmusError:
        raise
    except Exception as error:
        raise BundleError(f"{where}: {str(error)[:200]}") from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # a class that cannot be imported, below BaseException
            raise
        raise BundleError(f"{where}: the tokenizers library failed: {str(error)[:200]}") from error


def read_tokenizer_json(raw: bytes) -> tuple[tokenizers.Tokenizer, list[str]]:
    """A tokenizer and the rules of its model. Raises any error for broken content."""
    model = json.loads(raw)["model"]
    if (kind := model.get("type", "BPE")) not in ("BPE", "Unigram"):
        raise BundleError(f"tokenizer.json: a model of type {str(kind)[:40]}, this program reads BPE and Unigram")
    if kind == "Unigram":
        rules = sentencepiece.unigram_rules((str(token), float(score)) for token, score in model["vocab"])
    else:
        split = (pair.split(" ", 1) if isinstance(pair, str) else pair for pair in model["merges"])
        pairs = [(str(left), str(right)) for left, right in split]
        rules = sentencepiece.merge_rules(pairs) if model.get("byte_fallback") else list(map(" ".join, pairs))
    return tokenizers.Tokenizer.from_str(raw.decode()), rules


def read_sentencepiece(folder: Path, raw: bytes) -> tuple[tokenizers.Tokenizer, list[str]]:
    """The same from a tokenizer.model, with the tokens that tokenizer_config.json or added_tokens.json add."""
    pieces = sentencepiece.parse(raw)
    backend = sentencepiece.build(pieces)
    for id, token in sorted(added_tokens(folder).items()):
        backend.add_tokens([token])
        if backend.token_to_id(token.content) != id:
            raise BundleError(f"{folder.name}: added token {token.content[:40]!a} does not get its id {id}")
    return backend, pieces.rules()


def added_tokens(folder: Path) -> dict[int, tokenizers.AddedToken]:
    """By id, those that come on top of a tokenizer.model. Raises any error for broken content."""
    plain = read_json(folder / "added_tokens.json") if (folder / "added_tokens.json").exists() else {}
    found = {id: tokenizers.AddedToken(text, special=True, normalized=False) for text, id in plain.items()}
    for id, token in (tokenizer_config(folder).get("added_tokens_decoder") or {}).items():
        settings = {key: token[key] for key in ("lstrip", "rstrip", "single_word", "special") if key in token}
        found[int(id)] = tokenizers.AddedToken(token["content"], normalized=False, **settings)
    return found


def tokenizer_config(folder: Path) -> dict[str, Any]:
    """The content of tokenizer_config.json; empty without one. Raises BundleError."""
    path = folder / "tokenizer_config.json"
    return read_json(path) if path.exists() else {}


def named_tokens(content: dict[str, Any]) -> dict[str, str]:
    """Named special tokens with their text."""
    tokens = {name: content.get(name) for name in NAMED_TOKENS}
    texts = {name: token.get("content") if isinstance(token, dict) else token for name, token in tokens.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def template_source(folder: Path, content: dict[str, Any]) -> str | None:
    """The source of the chat template, if there is one."""
    template = content.get("chat_template")
    if (path := folder / "chat_template.jinja").exists():
        template = read_bytes(path, MAX_TOKENIZER_BYTES).decode("utf-8", errors="replace")
    if isinstance(template, list):  # several named templates, in older checkpoints
        named = [entry for entry in template if isinstance(entry, dict) and entry.get("name") == "default"]
        template = named[0].get("template") if named else None
    return template if isinstance(template, str) else None


def configured_ends(folder: Path) -> list[object]:
    """The eos_token_id of config.json and generation_config.json: one id, several or none."""
    ends: list[object] = []
    for name in ("config.json", "generation_config.json"):
        value = read_json(folder / name).get("eos_token_id") if (folder / name).exists() else None
        ends += value if isinstance(value, list) else [value]
    return ends
