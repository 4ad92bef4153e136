"""Bodies of requests: read within a time, and within a budget of memory for all of them together.

A body is read before its request takes an admission slot: a slow client holds a connection, and nothing else.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.requests import Request


class UploadRefused(Exception):
    """A body that is too large (413), too slow (408), or one too many (503)."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code = status, code


class Uploads:
    """The bodies that an API holds: each at most `body_bytes`, all at most `total_bytes`, each within `timeout_s`."""

    def __init__(self, body_bytes: int, total_bytes: int, timeout_s: float) -> None:
        self._body_bytes, self._total_bytes, self._timeout_s = body_bytes, total_bytes, timeout_s
        self._held_bytes = 0

    @asynccontextmanager
    async def body(self, request: Request) -> AsyncIterator[bytes]:
        """The body, which counts as held until the end. Raises UploadRefused, ClientDisconnect."""
        if request.headers.get("content-length", "").isdecimal():
            self._check_size(int(request.headers["content-length"][:20]))
        data = bytearray()
        try:
            try:
                async with asyncio.timeout(self._timeout_s):
                    async for part in request.stream():
                        data += part
                        self._held_bytes += len(part)
                        self._check_size(len(data))
            except TimeoutError:
                message = f"the body did not arrive within {self._timeout_s:g} s"
                raise UploadRefused(408, "request_timeout", message) from None
            yield bytes(data)
        finally:
            self._held_bytes -= len(data)

    def _check_size(self, size: int) -> None:
        if size > self._body_bytes:
            raise UploadRefused(413, "request_too_large", f"the body is larger than {self._body_bytes} bytes")
        if self._held_bytes > self._total_bytes:
            message = f"bodies of other requests fill the {self._total_bytes} bytes that there are; try again later"
            raise UploadRefused(503, "overloaded", message)
