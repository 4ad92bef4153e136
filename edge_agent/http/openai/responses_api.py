"""The dialect of POST /v1/responses: response objects, and their events in a stream.

    response.created, response.in_progress
      each output item:  output_item.added, its text or arguments in deltas, done, output_item.done
    response.completed, or response.incomplete at the limit of tokens

An item is a message with one part of text, or a function call.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from typing import Any

from isthmus.edge_agent.http.openai.dialect import EVENT_STREAM
from isthmus.edge_agent.http.openai.errors import ApiError
from isthmus.edge_agent.http.openai.jobs import Job
from isthmus.edge_agent.http.openai.responses import answer_reader, pieces_of
from isthmus.edge_agent.http.openai.responses_body import response_job
from isthmus.edge_agent.http.openai.streaming import ChoiceEvent, server_sent_event
from isthmus.edge_agent.http.openai.tool_calls import Piece
from isthmus.edge_agent.http.openai.usage import isthmus_field, usage
from isthmus.edge_agent.language.detokenize import Outcome
from isthmus.edge_agent.language.request import GenerationBackend
from isthmus.models.language.checkpoint.tool_format import ToolCall

Json = dict[str, Any]


class ResponseEvents:
    """The events of one response, in order; `output` has the items so far."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._common = {
            "id": f"resp_{secrets.token_hex(16)}",
            "object": "response",
            "created_at": int(time.time()),
            "model": job.model,
            "error": None,
            "previous_response_id": None,
            "store": False,
            "truncation": "disabled",
            **job.echoed,
        }
        self.output: list[Json] = []
        self._number = 0
        self._text: str | None = None  # of the message under way

    def opening(self) -> Iterator[Json]:
        for name in ("created", "in_progress"):
            yield self._event(f"response.{name}", response=self.response("in_progress"))

    def piece(self, piece: Piece) -> Iterator[Json]:
        if isinstance(piece, ToolCall):
            yield from self._end_message()
            yield from self._call(piece)
            return
        if self._text is None:
            yield from self._begin_message()
        self._text = (self._text or "") + piece
        yield self._event("response.output_text.delta", **self._place(), delta=piece, logprobs=[])

    def closing(self, outcome: Outcome) -> Iterator[Json]:
        if not self.output:
            yield from self._begin_message()
        yield from self._end_message()
        status = "incomplete" if outcome.finish == "length" else "completed"
        yield self._event(f"response.{status}", response=self.response(status, outcome))

    def response(self, status: str, outcome: Outcome | None = None) -> Json:
        """The response object. Without an outcome it is under way."""
        found = {**self._common, "status": status, "output": list(self.output), "usage": None}
        found["incomplete_details"] = {"reason": "max_output_tokens"} if status == "incomplete" else None
        if outcome is None:
            return {**found, "output": []}
        return {**found, "usage": response_usage(self._job, outcome), "isthmus": isthmus_field(self._job, [outcome])}

    def _begin_message(self) -> Iterator[Json]:
        item = {"id": f"msg_{secrets.token_hex(16)}", "type": "message", "role": "assistant", "status": "in_progress"}
        self.output.append({**item, "content": []})
        self._text = ""
        yield self._event("response.output_item.added", output_index=len(self.output) - 1, item=self.output[-1])
        yield self._event("response.content_part.added", **self._place(), part=text_part(""))

    def _end_message(self) -> Iterator[Json]:
        if self._text is None:
            return
        part = text_part(self._text)
        yield self._event("response.output_text.done", **self._place(), text=self._text, logprobs=[])
        yield self._event("response.content_part.done", **self._place(), part=part)
        self.output[-1] = {**self.output[-1], "status": "completed", "content": [part]}
        self._text = None
        yield self._event("response.output_item.done", output_index=len(self.output) - 1, item=self.output[-1])

    def _call(self, call: ToolCall) -> Iterator[Json]:
        item = {"id": f"fc_{secrets.token_hex(16)}", "type": "function_call", "call_id": call.id, "name": call.name}
        self.output.append({**item, "arguments": "", "status": "in_progress"})
        place = {"item_id": item["id"], "output_index": len(self.output) - 1}
        index, arguments = place["output_index"], call.arguments
        yield self._event("response.output_item.added", output_index=index, item=self.output[-1])
        yield self._event("response.function_call_arguments.delta", **place, delta=arguments)
        yield self._event("response.function_call_arguments.done", **place, name=call.name, arguments=arguments)
        self.output[-1] = {**item, "arguments": arguments, "status": "completed"}
        yield self._event("response.output_item.done", output_index=index, item=self.output[-1])

    def _place(self) -> Json:
        """Of the text of the message under way."""
        return {"item_id": self.output[-1]["id"], "output_index": len(self.output) - 1, "content_index": 0}

    def _event(self, type: str, **fields: object) -> Json:
        self._number += 1
        return {"type": type, "sequence_number": self._number - 1, **fields}


class ResponsesDialect:
    """Of /v1/responses."""

    media_type = EVENT_STREAM

    def parse(self, data: bytes, private: bool, backend: GenerationBackend, /) -> Job:
        return response_job(data, private, backend)

    async def collect(self, job: Job, events: AsyncIterator[ChoiceEvent]) -> Json:
        last: Json = {}
        async for event in response_events(job, events):
            last = event
        response: Json = last["response"]
        return response

    async def stream(self, job: Job, events: AsyncIterator[ChoiceEvent]) -> AsyncGenerator[bytes, None]:
        async for event in response_events(job, events):
            yield b"event: %b\n%b" % (event["type"].encode(), server_sent_event(event))

    def stream_error(self, error: ApiError) -> bytes:
        fields: Json = {"type": "error", "sequence_number": 0, **{name: error.error[name] for name in ERROR_FIELDS}}
        return b"event: error\n" + server_sent_event(fields)

    def error_body(self, error: ApiError) -> Json:
        return {"error": error.error}


ERROR_FIELDS = ("code", "message", "param")


async def response_events(job: Job, events: AsyncIterator[ChoiceEvent]) -> AsyncGenerator[Json, None]:
    """The events of a response. The first comes after the backend's first event, so that its errors come before."""
    made, reader, begun = ResponseEvents(job), answer_reader(job), False
    async for _, event in events:
        if not begun:
            begun = True
            for each in made.opening():
                yield each
        for piece in pieces_of(reader, event):
            for each in made.piece(piece):
                yield each
        if isinstance(event, Outcome):
            for each in made.closing(event):
                yield each


def text_part(text: str) -> Json:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def response_usage(job: Job, outcome: Outcome) -> Json:
    counts = usage(job, [outcome])
    return {
        "input_tokens": counts["prompt_tokens"],
        "input_tokens_details": {"cached_tokens": counts["prompt_tokens_details"]["cached_tokens"]},
        "output_tokens": counts["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": counts["total_tokens"],
    }
