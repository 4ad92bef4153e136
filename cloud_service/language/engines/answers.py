"""Reads what an engine sent. Nothing of it is trusted: what cannot be right is an EngineFault, never a wrong token."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from typing import Any

from isthmus.cloud_service.language.engines.protocol import Choice
from isthmus.models.errors import EngineFault
from isthmus.models.messages import Logprobs

ANY_ID = 1 << 32  # a bound for ids that are only compared, as those of another tokenizer are
LOGPROB_SLACK = 1e-3  # above 0, of rounding


def parse(raw: bytes) -> dict[str, Any]:
    """A JSON object."""
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise EngineFault("the engine sent bytes that are not JSON") from error
    if not isinstance(value, dict):
        raise EngineFault("the engine sent JSON that is not an object")
    return value


def read_event(event: bytes) -> dict[str, Any] | None:
    """What an event of a stream carries; None for the mark of its end. Raises EngineFault for an error in it."""
    if event == b"[DONE]":
        return None
    answer = parse(event)
    if "error" in answer:
        raise EngineFault("the engine failed in the middle of an answer")
    return answer


def listed(value: Any, what: str, length: int | None = None) -> list[Any]:
    """A list, of `length` entries if given."""
    if not isinstance(value, list):
        raise EngineFault(f"the engine sent no list of {what}")
    if length is not None and len(value) != length:
        raise EngineFault(f"the engine sent {len(value)} {what}, expected {length}")
    return value


def mapping(value: Any, what: str) -> dict[str, Any]:
    """An object."""
    if not isinstance(value, dict):
        raise EngineFault(f"the engine sent no {what}")
    return value


def token_id(value: Any, vocab: int) -> int:
    """An id within the vocabulary."""
    if type(value) is not int or not 0 <= value < vocab:
        raise EngineFault(f"the engine sent the token {str(value)[:20]!r}, outside of the vocabulary of {vocab}")
    return value


def numeral(text: str, vocab: int) -> int:
    """An id that is written as text."""
    return token_id(int(text) if text.isascii() and text.isdecimal() and len(text) < 12 else text, vocab)


def logprob(value: Any) -> float:
    """A finite natural logarithm of a probability."""
    if type(value) not in (int, float) or not -sys.float_info.max <= value <= LOGPROB_SLACK:  # an int has no bound
        raise EngineFault(f"the engine sent {str(value)[:20]!r} as a log-probability")
    return float(value)


def likeliest(values: Iterable[tuple[int, float]]) -> list[tuple[int, float]]:
    """Most likely first; of equal ones the lowest id, which is the one that a greedy engine takes."""
    return sorted(values, key=lambda pair: (-pair[1], pair[0]))


def own(values: Iterable[tuple[int, float]], id_: int, top: int) -> Logprobs:
    """Of the text's own token, which an engine lists beside the likeliest `top`."""
    ordered = likeliest(values)
    value = next((value for listed_id, value in ordered if listed_id == id_), None)
    if value is None:
        raise EngineFault(f"the engine sent no log-probability of the text's token {id_}")
    return Logprobs(value, tuple(ordered[:top]))


def chosen(values: Iterable[tuple[int, float]], top: int | None) -> Choice:
    """The greedy choice among the likeliest tokens of a position."""
    ordered = likeliest(values)
    if not ordered:
        raise EngineFault("the engine sent a position without any likely token")
    token, own = ordered[0]
    return Choice(token, None if top is None else Logprobs(own, tuple(ordered[:top])))
