from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import Any

import pytest
from starlette.requests import Request

from isthmus.edge_agent.http.uploads import UploadRefused, Uploads


def request(*parts: bytes, complete: bool = True, length: str | None = None) -> Request:
    """A request whose body comes in these parts; an incomplete one hangs after them."""
    messages = [{"type": "http.request", "body": part, "more_body": True} for part in parts]
    messages += [{"type": "http.request", "body": b"", "more_body": False}] if complete else []
    left = iter(messages)

    async def receive() -> Any:
        if (message := next(left, None)) is None:
            await asyncio.Event().wait()
        return message

    headers = [(b"content-length", length.encode())] if length is not None else []
    return Request({"type": "http", "method": "POST", "headers": headers}, receive)


def run(test: Callable[[], Any]) -> None:
    asyncio.run(test())


async def refused(uploads: Uploads, request: Request) -> tuple[int, str]:
    with pytest.raises(UploadRefused) as caught:
        async with uploads.body(request):
            raise AssertionError("it was accepted")
    return caught.value.status, caught.value.code


def test_a_body_arrives_in_parts() -> None:
    async def test() -> None:
        async with Uploads(10, 100, 5.0).body(request(b"ab", b"", b"cd")) as body:
            assert body == b"abcd"

    run(test)


def test_a_body_that_is_too_large_is_refused_from_its_length_or_while_it_arrives() -> None:
    async def test() -> None:
        uploads = Uploads(10, 100, 5.0)
        for length in ("11", "9" * 5000):
            assert await refused(uploads, request(complete=False, length=length)) == (413, "request_too_large")
        assert await refused(uploads, request(b"x" * 6, b"x" * 6, complete=False)) == (413, "request_too_large")
        async with uploads.body(request(b"x" * 10, length="10")) as body:
            assert len(body) == 10

    run(test)


def test_a_body_that_does_not_arrive_in_time_is_refused() -> None:
    async def test() -> None:
        assert await refused(Uploads(10, 100, 0.01), request(b"x", complete=False)) == (408, "request_timeout")

    run(test)


def test_all_bodies_together_are_bounded_and_counted_until_they_are_let_go() -> None:
    async def test() -> None:
        uploads = Uploads(10, 25, 5.0)
        async with AsyncExitStack() as stack:
            for _ in range(2):
                await stack.enter_async_context(uploads.body(request(b"x" * 10)))
            assert await refused(uploads, request(b"x" * 10)) == (503, "overloaded")
            assert await refused(uploads, request(b"x" * 11)) == (413, "request_too_large")
            async with uploads.body(request(b"x" * 5)):
                pass
        async with uploads.body(request(b"x" * 10)):
            pass

    run(test)
