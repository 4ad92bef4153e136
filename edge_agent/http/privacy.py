"""What keeps a request on the device: the header X-Isthmus-Private, of photos as of prompts."""

from __future__ import annotations

from starlette.datastructures import Headers

PRIVATE_HEADER = "x-isthmus-private"
FALSE_VALUES = ("", "0", "false", "no")  # any other value of that header keeps the request on the device


def is_true(value: str) -> bool:
    """Whether a value of the header, or of a query parameter of the same meaning, says yes."""
    return value.strip().lower() not in FALSE_VALUES


def is_private(headers: Headers) -> bool:
    """Whether any of the request's headers keeps it on the device."""
    return any(is_true(value) for value in headers.getlist(PRIVATE_HEADER))
