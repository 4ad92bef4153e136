"""From the blocking backend to asyncio, and from its events to a response or to server-sent events.

    Job -> generate_choices, in one worker thread -> queue -> collect_response | stream_chunks

The backend blocks, so each request has a worker thread of its own. When the client disconnects, the generator is closed
in that thread, before its next token. A slow reader does not stall it: the queue is unbounded, and the context bounds
the answer.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence

import anyio
from anyio import to_thread

from isthmus.edge_agent.http.openai.jobs import Job
from isthmus.edge_agent.http.openai.responses import ResponseFormatter
from isthmus.edge_agent.language.detokenize import AnswerEvent, Detokenizer, Outcome, TextDelta, close, detokenize
from isthmus.edge_agent.language.request import GenerationBackend, GenerationRequest, Summary, Token
from isthmus.models.language.checkpoint.tokenizer import Tokenizer

ChoiceEvent = tuple[int, AnswerEvent]  # index of the choice, event


def generate_choices(backend: GenerationBackend, job: Job, cancelled: threading.Event) -> Iterator[ChoiceEvent]:
    """The events of a job's choices, in turn; `cancelled` ends a wait for the local model or the cloud."""
    for index, request in enumerate(job.requests):
        if job.scores_prompts:
            yield index, scored_prompt(job.tokenizer, backend.score(request, cancelled))
        if not request.max_tokens:
            yield index, Outcome("length", 0, 0, unanswered(request))
            continue
        detokenizer = Detokenizer(
            job.tokenizer, job.all_stops, continues=job.kind == "completion", keeps_end=job.scores_prompts
        )
        events = detokenize(backend.generate(request, cancelled), detokenizer)
        try:
            for event in events:
                yield index, event
        finally:
            close(events)


def scored_prompt(tokenizer: Tokenizer, tokens: Sequence[Token]) -> tuple[TextDelta, ...]:
    """The tokens of a prompt, with the characters that each completes."""
    detokenizer = Detokenizer(tokenizer, keeps_end=True)
    deltas = [delta for token in tokens for delta in detokenizer.push(token)]
    return (*deltas, *detokenizer.finish())


def unanswered(request: GenerationRequest) -> Summary:
    """Of a request whose prompt alone was wanted."""
    return Summary("length", len(request.prompt), 0, request.arm, "no token was asked for")


async def in_thread(events: Iterator[ChoiceEvent], cancelled: threading.Event) -> AsyncGenerator[ChoiceEvent, None]:
    """Iterate `events` in one worker thread. Closing this sets `cancelled`, closes `events` there, and waits for it."""
    queue: asyncio.Queue[ChoiceEvent | None] = asyncio.Queue()
    loop = asyncio.get_running_loop()

    def work() -> None:
        try:
            while not cancelled.is_set() and (event := next(events, None)) is not None:
                loop.call_soon_threadsafe(queue.put_nowait, event)
        finally:
            close(events)
            loop.call_soon_threadsafe(queue.put_nowait, None)

    worker = asyncio.create_task(to_thread.run_sync(work))
    try:
        while (event := await queue.get()) is not None:
            yield event
        await worker
    finally:
        cancelled.set()
        with anyio.CancelScope(shield=True):
            await asyncio.gather(worker, return_exceptions=True)


async def collect_response(
    formatter: ResponseFormatter, job: Job, events: AsyncIterator[ChoiceEvent]
) -> dict[str, object]:
    """The body of a non-streaming response."""
    deltas: list[list[TextDelta]] = [[] for _ in job.requests]
    outcomes: list[Outcome] = []
    async for index, event in events:
        if isinstance(event, Outcome):
            outcomes.append(event)
        else:
            deltas[index] += event
    answers = enumerate(zip(deltas, outcomes, strict=True))
    return formatter.response([formatter.choice(index, *answer) for index, answer in answers], outcomes)


async def stream_chunks(
    formatter: ResponseFormatter, job: Job, events: AsyncIterator[ChoiceEvent]
) -> AsyncGenerator[bytes, None]:
    """Server-sent events. The first is yielded only after the backend's first event, so that its errors come before."""
    outcomes: list[Outcome] = []
    opened = -1
    async for index, event in events:
        if index != opened:
            opened = index
            if (opening := formatter.opening(index)) is not None:
                yield server_sent_event(formatter.chunk([opening]))
        if isinstance(event, Outcome):
            outcomes.append(event)
            *rest, closing = formatter.closing(index, event)
            last = index == len(job.requests) - 1
            ending = formatter.last_chunks(closing, outcomes) if last else [formatter.chunk([closing])]
            for chunk in [*(formatter.chunk([each]) for each in rest), *ending]:
                yield server_sent_event(chunk)
        else:
            for each in formatter.deltas(index, event):
                yield server_sent_event(formatter.chunk([each]))
    yield b"data: [DONE]\n\n"


def server_sent_event(value: dict[str, object]) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False, allow_nan=False).encode() + b"\n\n"
