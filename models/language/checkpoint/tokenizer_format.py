"""A tokenizer as bytes, which a service sends to a device that has none of its own: two lines of JSON.

    {"bos":[1],"eos":[2],"format":1,"merges":SHA-256,"sampling":{...},"template":{...},"unused":[]}
    {"version":"1.0",...,"model":{...}}     the `tokenizers` library's tokenizer.json, on one line

The first line is a `Header`, keys in order. The second goes to the library unread: the Python objects of a large
vocabulary take ten times its bytes. The bytes are as trustworthy as who sent them: a template or a regular expression
can take long, but neither reaches beyond its sandbox.
"""

from __future__ import annotations

import json
from typing import Annotated, Literal

import tokenizers
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from tokenizers import models

from isthmus.models.bundle.files import first_problem
from isthmus.models.bundle.manifest import Sha256
from isthmus.models.errors import BundleError
from isthmus.models.language.checkpoint.chat_template import MAX_TEMPLATE_CHARACTERS
from isthmus.models.language.checkpoint.tokenizer_files import library_errors
from isthmus.models.language.checkpoint.weights import MAX_VOCAB
from isthmus.models.messages import MAX_TOKENIZER_BYTES

MAX_NAMED = 16  # tokens that a template can name
MAX_COMMAS = 4 * MAX_VOCAB  # a token has one, a merge two; bounds what the library allocates before it checks
WHERE = "tokenizer"

TokenId = Annotated[int, Field(ge=0, lt=MAX_VOCAB)]


class Part(BaseModel):
    """A part of the first line: exact types, finite numbers, no unknown field."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, strict=True)


class StoredTemplate(Part):
    """Source of a chat template, and the special tokens that it can name."""

    source: Annotated[str, Field(max_length=MAX_TEMPLATE_CHARACTERS)]
    tokens: Annotated[dict[str, str], Field(max_length=MAX_NAMED)]


class StoredSampling(Part):
    """What the model's makers recommend."""

    temperature: float
    top_p: float


class Header(Part):
    """`merges` is a digest of the model's rules in order, which the library does not keep as the file has them."""

    format: Literal[1]
    bos: Annotated[list[TokenId], Field(max_length=MAX_VOCAB)]
    eos: Annotated[list[TokenId], Field(max_length=MAX_VOCAB)]
    unused: Annotated[list[TokenId], Field(max_length=MAX_VOCAB)]
    merges: Sha256
    sampling: StoredSampling
    template: StoredTemplate | None


def pack(header: Header, backend: tokenizers.Tokenizer) -> bytes:
    """Both lines; the same bytes for the same tokenizer. Raises BundleError when it is too large."""
    first = json.dumps(header.model_dump(), ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    raw = f"{first}\n{backend.to_str()}".encode()
    check_size(raw)
    return raw


def unpack(raw: bytes) -> tuple[Header, tokenizers.Tokenizer]:
    """The inverse of `pack`. Raises BundleError for anything else."""
    check_size(raw)
    first, _, second = raw.partition(b"\n")
    try:
        header = Header.model_validate_json(first)
    except ValidationError as error:
        raise BundleError(f"{WHERE}: first line: {first_problem(error, 'header')}") from error
    with library_errors(WHERE):
        text = second.decode()
        backend = tokenizers.Tokenizer.from_str(text)
        if isinstance(backend.model, models.Unigram):
            backend.model = exact_unigram(text)
    return header, backend


def check_size(raw: bytes) -> None:
    """Raises BundleError."""
    if len(raw) > MAX_TOKENIZER_BYTES:
        raise BundleError(f"{WHERE}: {len(raw)} bytes, at most {MAX_TOKENIZER_BYTES}")
    if (commas := raw.count(b",")) > MAX_COMMAS:
        raise BundleError(f"{WHERE}: {commas} commas, at most {MAX_COMMAS}: more entries than a vocabulary has")


def exact_unigram(text: str) -> models.Unigram:
    """The model with its scores as written: the library's own parser is off in the last digit of one in eight."""
    model = json.loads(text)["model"]
    scored = [(token, float(score)) for token, score in model["vocab"]]
    return models.Unigram(scored, *(model.get(name) for name in ("unk_id", "byte_fallback", "alpha", "nbest_size")))
