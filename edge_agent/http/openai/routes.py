"""OpenAI's HTTP API over the prompt loop. Knows nothing of models, the link, or how requests and answers are worded.

POST /v1/chat/completions   POST /v1/completions     whole, or with `stream` as server-sent events
GET  /v1/models             GET  /v1/models/{id}

    body -> Job (openai_schema.py) -> one worker thread runs the prompt loop -> queue -> chunks (openai_replies.py)

The prompt loop blocks, so each request has a thread of its own; when the client goes it is closed there, before its
next token. A slow reader does not keep it: an answer is never longer than the context, and the queue holds all of it.
"""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass

import anyio
from anyio import to_thread
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from isthmus.edge_agent.http.openai.replies import Reply, model, model_list, reply_to, text_of
from isthmus.edge_agent.http.openai.schema import ApiError, Check, Job, chat_job, completion_job, models, unknown_model
from isthmus.edge_agent.language.detokenize import Delta, Detokenizer, Outcome, Shown, close, read
from isthmus.edge_agent.language.request import Generator
from isthmus.models.errors import DeadlineExceeded, InvalidInput, LinkError, ServiceError

log = logging.getLogger("isthmus.edge")
PRIVATE = "x-isthmus-private"
NOT_PRIVATE = ("", "0", "false", "no")  # anything else in that header keeps the request on the device
JSON = "application/json"
EVENTS = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache", "x-accel-buffering": "no"}


@dataclass(frozen=True, slots=True)
class Limits:
    """What one device takes on."""

    waiting: int = 32  # requests in the house at once; above it 503
    computing: int = 4  # of them in the prompt loop; each holds a key-value cache and wants every core
    body_bytes: int = 4 << 20  # above it 413


class ApiState:
    """What the routes share: the prompt loop, and the places around it."""

    def __init__(self, generator: Generator, limits: Limits) -> None:
        self.generator = generator
        self.limits = limits
        self.places = asyncio.Semaphore(limits.computing)
        self.created = int(time.time())
        self._waiting = 0

    @contextmanager
    def place(self) -> Iterator[None]:
        """Raises ApiError 503 when the house is full."""
        if self._waiting >= self.limits.waiting:
            message = f"{self.limits.waiting} requests are being answered already"
            raise ApiError(503, message, type="overloaded", code="overloaded")
        self._waiting += 1
        try:
            yield
        finally:
            self._waiting -= 1

    async def models(self, request: Request) -> Response:
        return JSONResponse(model_list(self.generator, self.created))

    async def model(self, request: Request) -> Response:
        name, known = request.path_params["id"], models(self.generator)
        if name not in known:
            return failure(unknown_model(name, known))
        return JSONResponse(model(name, self.created))


class Endpoint:
    """One POST route, as an ASGI application: its place in the house is held until the prompt loop is closed."""

    def __init__(self, house: ApiState, check: Check) -> None:
        self._house = house
        self._check = check

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        try:
            if request.method != "POST":
                raise ApiError(405, f"{request.method} is not supported here, expected POST")
            check_content_type(request)
            with self._house.place():
                job = await self._job(request)
                async with while_connected(receive):
                    await self._answer(job, scope, receive, send)
        except ApiError as error:
            await failure(error)(scope, receive, send)
        except ClientDisconnect:
            return

    async def _job(self, request: Request) -> Job:
        """Raises ApiError. In a thread, as megabytes of prompt take the tokenizer a while."""
        data = await body(request, self._house.limits.body_bytes)
        private = any(value.strip().lower() not in NOT_PRIVATE for value in request.headers.getlist(PRIVATE))
        try:
            return await to_thread.run_sync(self._check, data, private, self._house.generator)
        except Exception as error:
            raise translated(error) from error

    async def _answer(self, job: Job, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises nothing: what fails before the first byte is a status, later an event."""
        reply = reply_to(job, self._house.generator.tokenizer)
        started = False
        try:
            async with self._house.places, aclosing(in_thread(steps(self._house.generator, job))) as made:
                if not job.stream:
                    await JSONResponse(await whole(reply, job, made))(scope, receive, send)
                    return
                async with aclosing(chunks(reply, job, made)) as lines:
                    async for line in lines:
                        if not started:
                            await send({"type": "http.response.start", "status": 200, "headers": raw(EVENTS)})
                            started = True
                        await send({"type": "http.response.body", "body": line, "more_body": True})
        except Exception as error:
            problem = translated(error)
            if not started:
                await failure(problem)(scope, receive, send)
                return
            await send({"type": "http.response.body", "body": event({"error": problem.error}), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def routes(generator: Generator, limits: Limits = Limits()) -> list[Route]:
    """To mount in an application."""
    house = ApiState(generator, limits)
    return [
        Route("/v1/chat/completions", Endpoint(house, chat_job)),
        Route("/v1/completions", Endpoint(house, completion_job)),
        Route("/v1/models", house.models),
        Route("/v1/models/{id:path}", house.model),
    ]


Made = AsyncGenerator[tuple[int, Delta], None]


def steps(generator: Generator, job: Job) -> Iterator[tuple[int, Delta]]:
    """The answers of a job one after the other, each step with the answer's index."""
    for index, ask in enumerate(job.asks):
        answer = read(generator.generate(ask), Detokenizer(generator.tokenizer, job.stops))
        try:
            for step in answer:
                yield index, step
        finally:
            close(answer)


async def in_thread(made: Iterator[tuple[int, Delta]]) -> Made:
    """What `made` yields, run in one worker thread. Closing this closes `made` in that thread, and waits for it."""
    queue: asyncio.Queue[tuple[int, Delta] | None] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    gone = threading.Event()

    def work() -> None:
        try:
            while not gone.is_set() and (step := next(made, None)) is not None:
                loop.call_soon_threadsafe(queue.put_nowait, step)
        finally:
            close(made)
            loop.call_soon_threadsafe(queue.put_nowait, None)

    worker = asyncio.create_task(to_thread.run_sync(work))
    try:
        while (step := await queue.get()) is not None:
            yield step
        await worker
    finally:
        gone.set()
        with anyio.CancelScope(shield=True):
            await asyncio.gather(worker, return_exceptions=True)


async def whole(reply: Reply, job: Job, made: Made) -> dict[str, object]:
    shown: list[list[Shown]] = [[] for _ in job.asks]
    outcomes: list[Outcome] = []
    async for index, step in made:
        if isinstance(step, Outcome):
            outcomes.append(step)
        else:
            shown[index] += step
    answers = enumerate(zip(shown, outcomes, strict=True))
    return reply.whole([reply.choice(index, *answer) for index, answer in answers], outcomes)


async def chunks(reply: Reply, job: Job, made: Made) -> AsyncGenerator[bytes, None]:
    """Server-sent events. The first is there when the prompt loop has made its first step, or failed instead."""
    outcomes: list[Outcome] = []
    opened = -1
    async for index, step in made:
        if index != opened:
            opened = index
            if (opening := reply.opening(index)) is not None:
                yield event(reply.chunk([opening]))
        if not isinstance(step, Outcome):
            if text_of(step) or (step and job.asks[index].top_logprobs is not None):
                yield event(reply.chunk([reply.delta(index, step)]))
            continue
        outcomes.append(step)
        closing = reply.closing(index, step)
        last = index == len(job.asks) - 1
        for chunk in reply.last(closing, outcomes) if last else [reply.chunk([closing])]:
            yield event(chunk)
    yield b"data: [DONE]\n\n"


def event(value: dict[str, object]) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False, allow_nan=False).encode() + b"\n\n"


@asynccontextmanager
async def while_connected(receive: Receive) -> AsyncIterator[None]:
    """Cancels its body when the client goes. The body raises nothing of its own."""
    async with anyio.create_task_group() as group:
        group.start_soon(watch, receive, group.cancel_scope)
        yield
        group.cancel_scope.cancel()


async def watch(receive: Receive, scope: anyio.CancelScope) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    scope.cancel()


def check_content_type(request: Request) -> None:
    """Raises ApiError 415. Any web page may post other types to this address without asking the browser's leave."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != JSON:
        raise ApiError(
            415, f"Content-Type is {kind[:100] or 'missing'}, expected {JSON}", code="unsupported_media_type"
        )


async def body(request: Request, most: int) -> bytes:
    """The body, read no further than the cap. Raises ApiError 413, ClientDisconnect."""
    data = bytearray()
    async for part in request.stream():
        data += part
        if len(data) > most:
            raise ApiError(413, f"the body is larger than {most} bytes", code="request_too_large")
    return bytes(data)


def translated(error: Exception) -> ApiError:
    """Whose fault it was, in OpenAI's words; what nobody foresaw is logged, and not told."""
    match error:
        case ApiError():
            return error
        case InvalidInput():
            return ApiError(400, str(error))
        case DeadlineExceeded():
            return ApiError(504, str(error), type="timeout", code="deadline_exceeded")
        case LinkError():
            return ApiError(503, str(error), type="overloaded", code="cloud_unavailable")
        case ServiceError():
            return ApiError(503, str(error), type="overloaded", code="overloaded")
    log.error("a request failed", exc_info=error)
    return ApiError(500, "the agent failed to answer; its log says why", type="server_error", code="internal_error")


def failure(error: ApiError) -> Response:
    headers = {"Retry-After": "1"} if error.status in (429, 503) else None
    return JSONResponse({"error": error.error}, error.status, headers)


def raw(headers: dict[str, str]) -> list[tuple[bytes, bytes]]:
    return [(name.encode(), value.encode()) for name, value in headers.items()]
