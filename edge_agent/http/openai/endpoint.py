"""A POST endpoint of the OpenAI API: admission, the body, the response or stream, disconnects and errors.

Knows nothing about how requests are validated (jobs.py) or responses are formatted (responses.py).
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager

import anyio
from anyio import to_thread
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from isthmus.edge_agent.http.openai.errors import ApiError, translate
from isthmus.edge_agent.http.openai.jobs import Job, JobParser
from isthmus.edge_agent.http.openai.responses import response_formatter
from isthmus.edge_agent.http.openai.state import ApiState
from isthmus.edge_agent.http.openai.streaming import (
    collect_response,
    generate_choices,
    in_thread,
    server_sent_event,
    stream_chunks,
)

PRIVATE_HEADER = "x-isthmus-private"
FALSE_VALUES = ("", "0", "false", "no")  # any other value of that header keeps the request on the device
JSON = "application/json"
STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


class Endpoint:
    """One POST route as an ASGI application. It holds its admission slot until the backend's generator is closed."""

    def __init__(self, state: ApiState, parse: JobParser) -> None:
        self._state = state
        self._parse = parse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        try:
            if request.method != "POST":
                raise ApiError(405, f"{request.method} is not supported here, expected POST")
            check_content_type(request)
            with self._state.admit():
                job = await self._read_job(request)
                async with while_connected(receive):
                    await self._respond(job, scope, receive, send)
        except ApiError as error:
            await error_response(error)(scope, receive, send)
        except ClientDisconnect:
            return

    async def _read_job(self, request: Request) -> Job:
        """Raises ApiError. Parses in a thread, as the tokenizer needs a while for megabytes of prompt."""
        data = await read_body(request, self._state.limits.body_bytes)
        values = request.headers.getlist(PRIVATE_HEADER)
        private = any(value.strip().lower() not in FALSE_VALUES for value in values)
        try:
            return await to_thread.run_sync(self._parse, data, private, self._state.backend)
        except Exception as error:
            raise translate(error) from error

    async def _respond(self, job: Job, scope: Scope, receive: Receive, send: Send) -> None:
        """An error before the first byte is sent as a status, later as an event."""
        backend, stream = self._state.backend, StreamWriter(send)
        formatter = response_formatter(job, backend.tokenizer)
        try:
            async with self._state.running_slots, aclosing(in_thread(generate_choices(backend, job))) as events:
                if job.stream:
                    await stream.write_all(stream_chunks(formatter, job, events))
                else:
                    await JSONResponse(await collect_response(formatter, job, events))(scope, receive, send)
        except Exception as error:
            api_error = translate(error)
            if not stream.started:
                await error_response(api_error)(scope, receive, send)
            else:
                await stream.write(server_sent_event({"error": api_error.error}))
        if stream.started:
            await stream.end()


class StreamWriter:
    """The body of a streaming response. The status is sent with the first bytes."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.started = False

    async def write(self, data: bytes) -> None:
        if not self.started:
            await self._send({"type": "http.response.start", "status": 200, "headers": STREAM_HEADERS})
            self.started = True
        await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def write_all(self, chunks: AsyncGenerator[bytes, None]) -> None:
        async with aclosing(chunks):
            async for chunk in chunks:
                await self.write(chunk)

    async def end(self) -> None:
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})


@asynccontextmanager
async def while_connected(receive: Receive) -> AsyncIterator[None]:
    """Cancel the body of this context when the client disconnects. The body must not raise."""
    async with anyio.create_task_group() as group:
        group.start_soon(cancel_on_disconnect, receive, group.cancel_scope)
        yield
        group.cancel_scope.cancel()


async def cancel_on_disconnect(receive: Receive, scope: anyio.CancelScope) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    scope.cancel()


def check_content_type(request: Request) -> None:
    """Raises ApiError 415. A web page can post other types across origins without a CORS preflight."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != JSON:
        message = f"Content-Type is {kind[:100] or 'missing'}, expected {JSON}"
        raise ApiError(415, message, code="unsupported_media_type")


async def read_body(request: Request, limit_bytes: int) -> bytes:
    """The body, read no further than the limit. Raises ApiError 413, ClientDisconnect."""
    data = bytearray()
    async for part in request.stream():
        data += part
        if len(data) > limit_bytes:
            raise ApiError(413, f"the body is larger than {limit_bytes} bytes", code="request_too_large")
    return bytes(data)


def error_response(error: ApiError) -> Response:
    headers = {"Retry-After": "1"} if error.status in (429, 503) else None
    return JSONResponse({"error": error.error}, error.status, headers)
