"""Multipart forms (RFC 7578): the one file and the fields of a body that has been read. What they hold is not known."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple, cast

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from isthmus.models.errors import InvalidInput

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

logging.getLogger("python_multipart").setLevel(logging.CRITICAL)  # a client's nonsense is no event of ours
MAX_PARTS = 16  # of a form: the file, and fields
MAX_HEADER_BYTES = 4096  # of a part
MAX_FIELD_BYTES = 256  # of a field's value: more is not looked at


class Form(NamedTuple):
    """The file, and the fields beside it by name; a field with a longer value is left out."""

    file: bytes
    fields: Mapping[str, str]


class _Parts:
    """Collects the first part that has a file name, and the fields."""

    def __init__(self) -> None:
        self.data: bytearray | None = None
        self.fields: dict[str, bytearray] = {}
        self._field: bytearray | None = None
        self.parts = self.files = self.header_bytes = 0
        self._header, self._value, self._is_file, self.ended = b"", b"", False, False

    def on_part_begin(self) -> None:
        self.parts += 1
        self.header_bytes, self._is_file, self._field = 0, False, None
        if self.parts > MAX_PARTS:
            raise InvalidInput(f"the form has more than {MAX_PARTS} parts")

    def on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header += self._counted(data[start:end])

    def on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += self._counted(data[start:end])

    def on_header_end(self) -> None:
        if self._header.lower() == b"content-disposition":
            options = parse_options_header(self._value)[1]
            self._is_file = b"filename" in options
            if not self._is_file:
                name = options.get(b"name", b"").decode("utf-8", "replace")
                self._field = self.fields[name] = bytearray()
        self._header = self._value = b""

    def on_headers_finished(self) -> None:
        self.files += self._is_file
        if self.files > 1:
            raise InvalidInput("the form has more than one file, expected one photo a request")
        if self._is_file:
            self.data = bytearray()

    def on_part_data(self, data: bytes, start: int, end: int) -> None:
        if self._is_file and self.data is not None:
            self.data += memoryview(data)[start:end]
        elif self._field is not None and len(self._field) <= MAX_FIELD_BYTES:
            self._field += data[start : min(end, start + MAX_FIELD_BYTES + 1)]

    def on_end(self) -> None:
        self.ended = True

    def _counted(self, data: bytes) -> bytes:
        self.header_bytes += len(data)
        if self.header_bytes > MAX_HEADER_BYTES:
            raise InvalidInput(f"a part of the form has more than {MAX_HEADER_BYTES} bytes of headers")
        return data


def read_form(body: bytes, content_type: str) -> Form:
    """A body that is the file itself, or a multipart form with one. Raises InvalidInput for a form without one file."""
    kind, options = parse_options_header(content_type)
    if kind != b"multipart/form-data":
        return Form(body, {})
    if not (boundary := options.get(b"boundary")):
        raise InvalidInput("Content-Type is multipart/form-data without a boundary")
    parts = _Parts()
    names = ("part_begin", "part_data", "header_field", "header_value", "header_end", "headers_finished", "end")
    try:
        callbacks = cast("MultipartCallbacks", {f"on_{name}": getattr(parts, f"on_{name}") for name in names})
        MultipartParser(boundary, callbacks).write(body)
    except FormParserError as error:
        raise InvalidInput(f"the multipart form is broken: {error}") from None
    if not parts.ended:
        raise InvalidInput("the multipart form is truncated: its last boundary is missing")
    if parts.data is None:
        raise InvalidInput("the multipart form has no file: no part has a file name")
    short = {name: value for name, value in parts.fields.items() if len(value) <= MAX_FIELD_BYTES}
    return Form(bytes(parts.data), {name: value.decode("utf-8", "replace") for name, value in short.items()})
