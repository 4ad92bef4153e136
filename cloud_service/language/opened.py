"""The tokens that an opening names, checked against the model and against what is held of its session. Pure."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from isthmus.models.errors import ContextGone, InvalidInput
from isthmus.models.messages import Opening
from isthmus.protos.wire_session import checksum


def check_ids(ids: Collection[int], vocab: int) -> None:
    """Raises InvalidInput for tokens that the model lacks."""
    if ids and max(ids) >= vocab:
        raise InvalidInput(f"token {max(ids)} is outside of the model's vocabulary of {vocab}")


def opened_tokens(opening: Opening, known: Sequence[int], vocab: int, context: int) -> list[int]:
    """All tokens of the session, which begin with some of `known`. Raises InvalidInput, ContextGone."""
    total = opening.start + len(opening.tokens)
    if total >= context:
        raise InvalidInput(f"{total} tokens leave no room in the model's context of {context}")
    check_ids(opening.tokens, vocab)
    held = known[: opening.start]
    tokens = [*held, *opening.tokens]
    if len(held) < opening.start or checksum(tokens) != opening.crc32:
        raise ContextGone(f"the first {opening.start} tokens of this session are not held here")
    return tokens
