"""Splits a stream of server-sent events into the data of each. Pure."""

from __future__ import annotations

from isthmus.models.errors import EngineFault

MAX_EVENT_BYTES = 1 << 20  # SGLang repeats an answer's tokens in every event


class EventSplitter:
    """Lines `data: …`; comments and other fields are left out."""

    def __init__(self, max_bytes: int = MAX_EVENT_BYTES) -> None:
        self._max_bytes = max_bytes
        self._rest = bytearray()

    def push(self, chunk: bytes) -> list[bytes]:
        """What each line that is complete now carries. Raises EngineFault for a line without an end."""
        self._rest += chunk
        if b"\n" not in chunk:
            lines: list[bytes] = []
        else:
            *lines, rest = bytes(self._rest).split(b"\n")
            self._rest = bytearray(rest)
        if len(self._rest) > self._max_bytes:
            raise EngineFault(f"the engine sent an event of more than {self._max_bytes} bytes")
        return [line[5:].strip() for line in lines if line.startswith(b"data:")]
