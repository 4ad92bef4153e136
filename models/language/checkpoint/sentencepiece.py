"""Build a tokenizer of the `tokenizers` library from a SentencePiece vocabulary, of a GGUF header or `tokenizer.model`.

    text -> a space in front, spaces to ▁ -> merges, best score first -> pieces; what is in none of them -> <0x..> bytes

A text between two special tokens counts as a text of its own and gets its space, as in llama.cpp and SentencePiece.
Format of `tokenizer.model`: sentencepiece_model.proto, a protocol buffer. Knows nothing about chat templates or models.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers

from isthmus.models.errors import BundleError
from isthmus.models.language.checkpoint.token_text import SPACE

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 1, 2, 3, 4, 5  # types of tokens; GGUF has the same numbers
UNIGRAM, BPE = 1, 2  # kinds of models in tokenizer.model
MAX_PIECES = 1 << 20
MAX_PIECE_CHARACTERS = 512  # Llama 2's longest has 16; every way to cut a piece in two is looked up


@dataclass(frozen=True, slots=True)
class Pieces:
    """Tokens in the order of their ids, each with score and type. `space_prefix`: a space is put before each text."""

    tokens: Sequence[str]
    scores: Sequence[float]
    types: Sequence[int]
    space_prefix: bool = True
    unigram: bool = False

    def merges(self) -> list[tuple[str, str]]:
        """All pairs of pieces that join to a piece, best first, as transformers derives them (`generate_merges`)."""
        typed = zip(self.tokens, self.scores, self.types, strict=True)
        scores = {token: score for token, score, kind in typed if kind == NORMAL}
        ids = {token: id for id, token in enumerate(self.tokens)}
        found = []
        for token, score in scores.items():
            cuts = [(token[:at], token[at:]) for at in range(1, len(token))]
            pairs = [pair for pair in cuts if pair[0] in scores and pair[1] in scores]
            found += [(score, pair) for pair in sorted(pairs, key=lambda pair: (ids[pair[0]], ids[pair[1]]))]
        found.sort(key=lambda entry: (entry[0], len(entry[1][0]), len(entry[1][1])), reverse=True)
        return [pair for _, pair in found]

    def rules(self) -> list[str]:
        """What beside the tokens decides how text is encoded, as one line each, for a fingerprint."""
        if self.unigram:
            return unigram_rules(zip(self.tokens, self.scores, strict=True))
        return merge_rules(self.merges())


def unigram_rules(scored: Iterable[tuple[str, float]]) -> list[str]:
    return [f"{token} {score!r}" for token, score in scored]


def merge_rules(merges: Sequence[tuple[str, str]]) -> list[str]:
    """What is merged, in order. How a piece is cut in two differs between converters and is left out."""
    return list(dict.fromkeys(left + right for left, right in merges))


def build(pieces: Pieces) -> tokenizers.Tokenizer:
    """Raises BundleError for an inconsistent vocabulary; the library may raise any error."""
    check(pieces)
    unknown = pieces.types.index(UNKNOWN)
    if pieces.unigram:
        scored = list(zip(pieces.tokens, pieces.scores, strict=True))
        model: models.Model = models.Unigram(scored, unknown, byte_fallback=True)
    else:
        vocabulary = {token: id for id, token in enumerate(pieces.tokens)}
        model = models.BPE(
            vocabulary, pieces.merges(), unk_token=pieces.tokens[unknown], fuse_unk=True, byte_fallback=True
        )
    backend = tokenizers.Tokenizer(model)
    prefix = [normalizers.Prepend(SPACE)] if pieces.space_prefix else []
    strip = [decoders.Strip(" ", 1, 0)] if pieces.space_prefix else []
    backend.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", SPACE)])
    backend.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    kinds = {UNKNOWN: True, CONTROL: True, USER_DEFINED: False}  # whether special
    added = ((token, kind) for token, kind in zip(pieces.tokens, pieces.types, strict=True) if kind in kinds)
    backend.add_tokens([AddedToken(token, normalized=False, special=kinds[kind]) for token, kind in added])
    return backend


def check(pieces: Pieces) -> None:
    """Raises BundleError."""
    count = len(pieces.tokens)
    if not count == len(pieces.scores) == len(pieces.types) == len(set(pieces.tokens)):
        raise BundleError(f"tokenizer: {count} tokens, expected as many scores and types, no duplicates")
    if UNKNOWN not in pieces.types:
        raise BundleError("tokenizer: no token has the type unknown")
    if not all(map(math.isfinite, pieces.scores)):
        raise BundleError("tokenizer: a score is not finite")
    if (longest := max(map(len, pieces.tokens))) > MAX_PIECE_CHARACTERS:
        raise BundleError(f"tokenizer: a token of {longest} characters, at most {MAX_PIECE_CHARACTERS}")


def parse(data: bytes) -> Pieces:
    """The content of a `tokenizer.model`. Raises BundleError naming what is broken or not supported."""
    tokens: list[str] = []
    scores: list[float] = []
    types: list[int] = []
    kind, space_prefix = UNIGRAM, True
    try:
        for number, value in fields(data):
            if number == 1:  # a piece
                piece = dict(fields(message(value)))
                tokens.append(message(piece.get(1, b"")).decode())
                scores.append(float(piece.get(2, 0.0)))
                types.append(int(piece.get(3, NORMAL)))
            elif number == 2:  # of the training
                kind = int(dict(fields(message(value))).get(3, UNIGRAM))
            elif number == 3:
                space_prefix = read_normalizer(dict(fields(message(value))))
            if len(tokens) > MAX_PIECES:
                raise BundleError(f"tokenizer.model: more than {MAX_PIECES} pieces")
    except (ValueError, TypeError, IndexError, struct.error) as error:
        raise BundleError("tokenizer.model: not a SentencePiece model") from error
    if not tokens or kind not in (UNIGRAM, BPE):
        raise BundleError("tokenizer.model: not a SentencePiece model of BPE or unigram")
    return Pieces(tokens, scores, types, space_prefix, unigram=kind == UNIGRAM)


def read_normalizer(spec: dict[int, object]) -> bool:
    """Whether a space is put before a text. Raises BundleError for rules that change a text in other ways."""
    if spec.get(2) or spec.get(4, 1):  # a table of replacements; runs of spaces become one
        raise BundleError(
            "tokenizer.model: its normalizer changes text (precompiled_charsmap or remove_extra_whitespaces), "
            "which is read from a tokenizer.json only: save the tokenizer with transformers"
        )
    if not spec.get(5, 1):
        raise BundleError("tokenizer.model: escape_whitespaces is off, which is not supported")
    return bool(spec.get(3, 1))


def message(value: object) -> bytes:
    """A field that holds bytes. Raises TypeError."""
    if not isinstance(value, bytes):
        raise TypeError
    return value


def fields(data: bytes) -> Iterator[tuple[int, bytes | int | float]]:
    """The fields of a protocol buffer: number, and bytes, an integer or a float32.

    Raises ValueError, IndexError or struct.error for anything else.
    """
    at = 0
    while at < len(data):
        tag, at = varint(data, at)
        number, wire = tag >> 3, tag & 7
        if wire == 0:
            value, at = varint(data, at)
            yield number, value
        elif wire == 1:
            yield number, bytes(data[at : at + 8])
            at += 8
        elif wire == 2:
            size, at = varint(data, at)
            if size > len(data) - at:
                raise ValueError
            yield number, data[at : at + size]
            at += size
        elif wire == 5:
            yield number, struct.unpack_from("<f", data, at)[0]
            at += 4
        else:
            raise ValueError


def varint(data: bytes, at: int) -> tuple[int, int]:
    """An integer of up to 64 bits and where it ends."""
    value = 0
    for shift in range(0, 70, 7):
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise ValueError
