"""A POST endpoint of an API for prompts: admission, the body, the response or stream, disconnects and errors.

Knows nothing about how requests are validated or responses are formatted: that is the dialect's.
"""

from __future__ import annotations

import threading
from collections.abc import AsyncGenerator
from contextlib import aclosing

from anyio import to_thread
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from isthmus.edge_agent.http.disconnect import while_connected
from isthmus.edge_agent.http.openai.chat_jobs import chat_job
from isthmus.edge_agent.http.openai.dialect import Dialect, OpenAiDialect
from isthmus.edge_agent.http.openai.errors import ApiError, translate
from isthmus.edge_agent.http.openai.jobs import Job
from isthmus.edge_agent.http.openai.state import ApiState
from isthmus.edge_agent.http.openai.streaming import generate_choices, in_thread
from isthmus.edge_agent.http.privacy import is_private
from isthmus.edge_agent.http.uploads import UploadRefused
from isthmus.edge_agent.language.switching import is_left_to_device
from isthmus.models.errors import Overloaded

JSON = "application/json"
HEADERS = {405: {"Allow": "POST"}, 503: {"Retry-After": "1"}}  # of error responses, by status
OPENAI = OpenAiDialect(chat_job)
STREAM_HEADERS = [(b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]


class Endpoint:
    """One POST route as an ASGI application. It holds its admission slot until the backend's generator is closed."""

    def __init__(self, state: ApiState, dialect: Dialect) -> None:
        self._state = state
        self._dialect = dialect

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        try:
            if request.method != "POST":
                raise ApiError(405, f"{request.method} is not supported here, expected POST")
            check_content_type(request)
            self._state.slots.check()
            async with self._state.uploads.body(request) as data, while_connected(receive):
                with self._state.slots.hold():
                    job = await self._parse_job(request, data)
                    if await self._respond(job, scope, receive, send):
                        await self._respond(await self._parse_job(request, data), scope, receive, send)
        except ClientDisconnect:
            return
        except (ApiError, Overloaded, UploadRefused) as error:
            await self._refuse(translate(error))(scope, receive, send)

    def _refuse(self, error: ApiError) -> Response:
        return error_response(error, self._dialect)

    async def _parse_job(self, request: Request, data: bytes) -> Job:
        """Raises ApiError. Parses in a thread, as the tokenizer needs a while for megabytes of prompt.

        A device without a model first waits for a cloud, as long for each request.
        """
        private = is_private(request.headers)
        backend, waiting = self._state.backend, self._state.waiting
        try:
            if not private:
                await to_thread.run_sync(backend.tokenizer_for, "auto", limiter=waiting, abandon_on_cancel=True)
            limiter = self._state.parsing(len(data))
            return await to_thread.run_sync(self._dialect.parse, data, private, backend, limiter=limiter)
        except Exception as error:
            raise translate(error) from error

    async def _respond(self, job: Job, scope: Scope, receive: Receive, send: Send) -> bool:
        """An error before the first byte is sent as a status, later as an event.

        Returns whether nothing was sent, since the body is to be parsed again for the device's model.
        """
        backend, dialect, cancelled = self._state.backend, self._dialect, threading.Event()
        stream = StreamWriter(send, dialect.media_type)
        try:
            events = in_thread(generate_choices(backend, job, cancelled), cancelled)
            async with self._state.running(job.arm), aclosing(events):
                if job.stream:
                    await stream.write_all(dialect.stream(job, events))
                else:
                    await JSONResponse(await dialect.collect(job, events))(scope, receive, send)
        except Exception as error:
            if not stream.started and is_left_to_device(backend, job.arm, job.tokenizer, error):
                return True
            api_error = translate(error, job.grammar_field)
            if not stream.started:
                await self._refuse(api_error)(scope, receive, send)
            else:
                await stream.write(dialect.stream_error(api_error))
        if stream.started:
            await stream.end()
        return False


class StreamWriter:
    """The body of a streaming response. The status is sent with the first bytes."""

    def __init__(self, send: Send, media_type: bytes) -> None:
        self._send = send
        self._headers = [(b"content-type", media_type), *STREAM_HEADERS]
        self.started = False

    async def write(self, data: bytes) -> None:
        if not self.started:
            await self._send({"type": "http.response.start", "status": 200, "headers": self._headers})
            self.started = True
        await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def write_all(self, chunks: AsyncGenerator[bytes, None]) -> None:
        async with aclosing(chunks):
            async for chunk in chunks:
                await self.write(chunk)

    async def end(self) -> None:
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})


def check_content_type(request: Request) -> None:
    """Raises ApiError 415. A web page can post other types across origins without a CORS preflight."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != JSON:
        message = f"Content-Type is {kind[:100] or 'missing'}, expected {JSON}"
        raise ApiError(415, message, code="unsupported_media_type")


def error_response(error: ApiError, dialect: Dialect = OPENAI) -> Response:
    return JSONResponse(dialect.error_body(error), error.status, HEADERS.get(error.status))
