"""The dialect of Ollama's /api/chat and /api/generate, and its /api/tags. A stream is one JSON object a line.

options, format, tools -> fields of a chat; `raw` text -> a completion
"""

from __future__ import annotations

import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from datetime import UTC, datetime
from typing import Any, ClassVar, Literal

from isthmus.edge_agent.http.openai.body import json_object, refuse_unsupported
from isthmus.edge_agent.http.openai.chat_jobs import job_of_chat
from isthmus.edge_agent.http.openai.completion_jobs import job_of_completion
from isthmus.edge_agent.http.openai.errors import ApiError
from isthmus.edge_agent.http.openai.jobs import Job
from isthmus.edge_agent.http.openai.responses import answer_reader, pieces_of
from isthmus.edge_agent.http.openai.schema import ChatRequest, CompletionRequest, validate
from isthmus.edge_agent.http.openai.streaming import ChoiceEvent
from isthmus.edge_agent.http.openai.tool_calls import Piece
from isthmus.edge_agent.http.openai.usage import isthmus_field, usage
from isthmus.edge_agent.language.detokenize import Outcome
from isthmus.edge_agent.language.request import GenerationBackend
from isthmus.models.language.checkpoint.tool_format import ToolCall

Json = dict[str, Any]
Kind = Literal["chat", "generate"]
UNSUPPORTED = {  # with values that change nothing
    "context": ([],),
    "images": ([],),
    "logprobs": (False,),
    "suffix": ("",),
    "template": ("",),
    "think": (False,),
    "top_logprobs": (0,),
}
OPTIONS = {  # a chat's field for each that changes the answer; others, of how Ollama runs a model, are ignored
    "frequency_penalty": "frequency_penalty",
    "num_predict": "max_tokens",
    "presence_penalty": "presence_penalty",
    "seed": "seed",
    "stop": "stop",
    "temperature": "temperature",
    "top_p": "top_p",
}
REFUSED_OPTIONS = {"min_p": (0,), "mirostat": (0,), "repeat_penalty": (1,), "top_k": (), "typical_p": (1,)}


class OllamaDialect:
    """Of one of the two endpoints."""

    media_type: ClassVar[bytes] = b"application/x-ndjson"

    def __init__(self, kind: Kind) -> None:
        self._kind = kind

    def parse(self, data: bytes, private: bool, backend: GenerationBackend, /) -> Job:
        body = json_object(data)
        refuse_unsupported(body, UNSUPPORTED)
        shared = {"model": body.get("model"), "stream": body.get("stream", True), **options_of(body.get("options"))}
        if self._kind == "generate" and body.get("raw"):
            fields = {"prompt": body.get("prompt"), "max_tokens": shared.pop("max_tokens", None) or 1 << 30, **shared}
            return job_of_completion(validate(CompletionRequest, fields), private, backend)
        shared["messages"] = chat_messages(body) if self._kind == "chat" else prompt_messages(body)
        shared |= {"tools": body.get("tools"), "response_format": format_of(body.get("format"))}
        return job_of_chat(validate(ChatRequest, shared), private, backend)

    async def collect(self, job: Job, events: AsyncIterator[ChoiceEvent]) -> Json:
        text, calls, last = "", list[Json](), Json()
        async for last in self._parts(job, events):
            said = last.get("message") or {"content": last["response"]}
            text, calls = text + said["content"], calls + said.get("tool_calls", [])
        return {**last, **self._said(text, calls)}

    async def stream(self, job: Job, events: AsyncIterator[ChoiceEvent]) -> AsyncGenerator[bytes, None]:
        async for part in self._parts(job, events):
            yield to_line(part)

    def stream_error(self, error: ApiError) -> bytes:
        return to_line(self.error_body(error))

    def error_body(self, error: ApiError) -> Json:
        return {"error": error.error["message"]}

    async def _parts(self, job: Job, events: AsyncIterator[ChoiceEvent]) -> AsyncGenerator[Json, None]:
        """An object for each piece of the answer, and last one with `done` and the counts."""
        reader, started_s = answer_reader(job), time.monotonic()
        first_s: float | None = None
        async for _, event in events:
            first_s = first_s or time.monotonic()
            for piece in pieces_of(reader, event):
                yield {**stamp(job), **self._piece(piece), "done": False}
            if isinstance(event, Outcome):
                times = durations(started_s, first_s, time.monotonic())
                yield {**stamp(job), **self._said("", []), "done": True, **ending(job, event), **times}

    def _piece(self, piece: Piece) -> Json:
        if isinstance(piece, ToolCall):
            call = {"function": {"name": piece.name, "arguments": json.loads(piece.arguments)}}
            return self._said("", [call])
        return self._said(piece, [])

    def _said(self, text: str, calls: list[Json]) -> Json:
        if self._kind == "generate":
            return {"response": text}
        return {"message": {"role": "assistant", "content": text, **({"tool_calls": calls} if calls else {})}}


def options_of(options: object) -> Json:
    """Raises ApiError."""
    if not isinstance(options, dict | None):
        raise ApiError(400, "options: expected an object", param="options")
    given = {name: value for name, value in (options or {}).items() if value is not None}
    refuse_unsupported(given, REFUSED_OPTIONS)
    if given.get("num_predict") in (-1, -2):  # as many as there is room for
        del given["num_predict"]
    return {OPTIONS[name]: value for name, value in given.items() if name in OPTIONS}


def chat_messages(body: Json) -> object:
    """Messages of a chat: their calls have no ids, and results come in the calls' order. Raises ApiError."""
    messages = body.get("messages")
    if not isinstance(messages, list):
        return messages
    ids, answered, made = list[str](), 0, list[object]()
    for message in messages:
        if not isinstance(message, dict):
            return messages
        refuse_unsupported(message, {"images": ([],)})
        message = {"content": "", **message}
        if isinstance(calls := message.get("tool_calls"), list) and all(map(is_call, calls)):
            named = [f"call_{len(ids) + index}" for index in range(len(calls))]
            ids += named
            message["tool_calls"] = [call_of(call, id) for call, id in zip(calls, named, strict=True)]
        elif message.get("role") == "tool" and answered < len(ids):
            message["tool_call_id"], answered = ids[answered], answered + 1
        made.append(message)
    return made


def is_call(call: object) -> bool:
    return isinstance(call, dict) and isinstance(call.get("function"), dict)


def call_of(call: Json, id: str) -> Json:
    function = call["function"]
    arguments = json.dumps(function.get("arguments") or {})
    return {"id": id, "type": "function", "function": {"name": function.get("name"), "arguments": arguments}}


def prompt_messages(body: Json) -> list[Json]:
    system = [{"role": "system", "content": body["system"]}] if body.get("system") else []
    return [*system, {"role": "user", "content": body.get("prompt")}]


def format_of(format: object) -> object:
    if format in (None, ""):
        return None
    if format == "json":
        return {"type": "json_object"}
    return {"type": "json_schema", "json_schema": {"name": "format", "schema": format}}


def stamp(job: Job) -> Json:
    return {"model": job.model, "created_at": datetime.now(UTC).isoformat().replace("+00:00", "Z")}


def ending(job: Job, outcome: Outcome) -> Json:
    counts = usage(job, [outcome])
    return {
        "done_reason": outcome.finish,
        "prompt_eval_count": counts["prompt_tokens"],
        "eval_count": counts["completion_tokens"],
        "isthmus": isthmus_field(job, [outcome]),
    }


def durations(started_s: float, first_s: float, now_s: float) -> Json:
    """Nanoseconds; the prompt's end with the first token."""
    spent = {"total": now_s - started_s, "load": 0.0, "prompt_eval": first_s - started_s, "eval": now_s - first_s}
    return {f"{name}_duration": int(seconds * 1e9) for name, seconds in spent.items()}


def ollama_tags(names: Iterable[str], created: int) -> Json:
    """Body of GET /api/tags. `created` is a Unix time in seconds."""
    modified = datetime.fromtimestamp(created, UTC).isoformat().replace("+00:00", "Z")
    models = [
        {"name": name, "model": name, "modified_at": modified, "size": 0, "digest": "", "details": {}} for name in names
    ]
    return {"models": models}


def to_line(value: Json) -> bytes:
    return json.dumps(value, ensure_ascii=False, allow_nan=False).encode() + b"\n"
