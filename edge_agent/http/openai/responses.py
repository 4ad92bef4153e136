"""OpenAI's response objects: chunks of a stream, non-streaming responses, usage, log probabilities.

    chat        an opening chunk with the role, chunks with text, a closing chunk with the finish_reason
    completion  an opening chunk with the echoed prompt if requested, chunks with text, a closing chunk

The last chunk and every non-streaming response also have a field of ours, `isthmus`: the arm that answered, why, and
what it cost. Knows nothing about HTTP.
"""

from __future__ import annotations

import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from typing import Any

from isthmus.edge_agent.http.openai.jobs import Job
from isthmus.edge_agent.http.openai.tool_calls import AnswerReader, Piece, PlainReader, ToolCallReader
from isthmus.edge_agent.http.openai.usage import isthmus_field, usage
from isthmus.edge_agent.language.detokenize import Outcome, TextDelta, bytes_of
from isthmus.edge_agent.language.request import Token
from isthmus.models.language.checkpoint.tokenizer import Tokenizer
from isthmus.models.language.checkpoint.tool_format import ToolCall

MIN_LOGPROB = -9999.0  # OpenAI's value for minus infinity, which JSON cannot represent
Json = dict[str, Any]


class ResponseFormatter(ABC):
    """Formats the answers to one job. One instance for each job: all its chunks repeat the same id and time."""

    chunk_object: str
    response_object: str
    prefix: str

    def __init__(self, job: Job) -> None:
        self._job = job
        self._tokenizer = job.tokenizer
        self._with_logprobs = job.requests[0].top_logprobs is not None
        self._common = {
            "id": f"{self.prefix}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": job.model,
            "system_fingerprint": f"isthmus-{version('isthmus')}-{job.arm}",
        }

    @abstractmethod
    def opening(self, index: int) -> Json | None:
        """The choice object of the first chunk of choice `index`; None: there is no such chunk."""

    @abstractmethod
    def deltas(self, index: int, deltas: Sequence[TextDelta]) -> list[Json]:
        """The choice objects of chunks with text; none where there is nothing to send yet."""

    @abstractmethod
    def closing(self, index: int, outcome: Outcome) -> list[Json]:
        """The choice objects of the last chunks of choice `index`, the last of which has its finish_reason."""

    @abstractmethod
    def choice(self, index: int, deltas: Sequence[TextDelta], outcome: Outcome) -> Json:
        """The choice object of a non-streaming response."""

    def chunk(self, choices: Sequence[Json], **fields: object) -> Json:
        """A chunk of a stream, with further fields."""
        usage = {"usage": None} if self._job.include_usage else {}
        return {"object": self.chunk_object, **self._common, "choices": list(choices), **usage, **fields}

    def response(self, choices: Sequence[Json], outcomes: Sequence[Outcome]) -> Json:
        """A non-streaming response."""
        fields = {"usage": usage(self._job, outcomes), "isthmus": isthmus_field(self._job, outcomes)}
        return {"object": self.response_object, **self._common, "choices": list(choices), **fields}

    def has_content(self, deltas: Sequence[TextDelta]) -> bool:
        """Whether there is anything to tell: text, or tokens whose log probabilities are wanted."""
        return bool(text_of(deltas) or (deltas and self._with_logprobs))

    def last_chunks(self, choice: Json, outcomes: Sequence[Outcome]) -> list[Json]:
        """The closing chunk of the last choice, and the chunk with the usage if it was requested."""
        isthmus = isthmus_field(self._job, outcomes)
        if not self._job.include_usage:
            return [self.chunk([choice], isthmus=isthmus)]
        return [self.chunk([choice]), self.chunk([], usage=usage(self._job, outcomes), isthmus=isthmus)]


class ChatFormatter(ResponseFormatter):
    chunk_object = "chat.completion.chunk"
    response_object = "chat.completion"
    prefix = "chatcmpl"

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self._readers = [answer_reader(job) for _ in job.requests]
        self._calls = [0] * len(job.requests)  # sent so far, of each choice

    def opening(self, index: int) -> Json:
        return self._delta(index, {"role": "assistant", "content": ""})

    def deltas(self, index: int, deltas: Sequence[TextDelta]) -> list[Json]:
        if not self.has_content(deltas):
            return []
        found = [
            self._delta(index, each) for each in self._piece_deltas(index, self._readers[index].push(text_of(deltas)))
        ]
        if self._with_logprobs:
            found = found or [self._delta(index, {"content": ""})]
            found[0]["logprobs"] = self._logprobs(deltas)
        return found

    def closing(self, index: int, outcome: Outcome) -> list[Json]:
        rest = self._piece_deltas(index, self._readers[index].finish())
        finish = finish_reason(outcome, bool(self._calls[index]))
        return [*(self._delta(index, each) for each in rest), self._delta(index, {}, finish=finish)]

    def choice(self, index: int, deltas: Sequence[TextDelta], outcome: Outcome) -> Json:
        reader = answer_reader(self._job)
        pieces = [*reader.push(text_of(deltas)), *reader.finish()]
        content = "".join(piece for piece in pieces if isinstance(piece, str))
        calls = [piece for piece in pieces if isinstance(piece, ToolCall)]
        message: Json = {"role": "assistant", "content": content or None if calls else content, "refusal": None}
        if calls:
            message["tool_calls"] = [call_object(call) for call in calls]
        return {
            "index": index,
            "message": message,
            "logprobs": self._logprobs(deltas),
            "finish_reason": finish_reason(outcome, bool(calls)),
        }

    def _piece_deltas(self, index: int, pieces: Sequence[Piece]) -> list[Json]:
        """A call is two: its name, then its arguments."""
        found: list[Json] = []
        for piece in pieces:
            if isinstance(piece, str):
                found.append({"content": piece})
                continue
            number, named = self._calls[index], call_object(replace(piece, arguments=""))
            self._calls[index] += 1
            found.append({"tool_calls": [{"index": number, **named}]})
            found.append({"tool_calls": [{"index": number, "function": {"arguments": piece.arguments}}]})
        return found

    def _delta(self, index: int, delta: Json, logprobs: Json | None = None, finish: str | None = None) -> Json:
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}

    def _logprobs(self, deltas: Sequence[TextDelta]) -> Json | None:
        if not self._with_logprobs:
            return None
        return {"content": [self._entry(token) for token in tokens_of(deltas)], "refusal": None}

    def _entry(self, token: Token) -> Json:
        tokenizer = token.tokenizer or self._tokenizer
        top = [self._logprob(tokenizer, id, logprob) for id, logprob in token.top]
        return {**self._logprob(tokenizer, token.id, token.logprob), "top_logprobs": top}

    def _logprob(self, tokenizer: Tokenizer, id: int, logprob: float | None) -> Json:
        data = bytes_of(tokenizer, id)
        return {"token": data.decode("utf-8", "replace"), "logprob": finite(logprob), "bytes": list(data)}


class CompletionFormatter(ResponseFormatter):
    chunk_object = "text_completion"
    response_object = "text_completion"
    prefix = "cmpl"

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self._offsets = [len(echo) for echo in job.echoed_prompts]

    def opening(self, index: int) -> Json | None:
        echo = self._job.echoed_prompts[index]
        return self._choice(index, echo) if echo else None

    def deltas(self, index: int, deltas: Sequence[TextDelta]) -> list[Json]:
        if not self.has_content(deltas):
            return []
        offset = self._offsets[index]
        self._offsets[index] += len(text_of(deltas))
        return [self._choice(index, text_of(deltas), self._logprobs(deltas, offset))]

    def closing(self, index: int, outcome: Outcome) -> list[Json]:
        return [self._choice(index, "", finish=outcome.finish)]

    def choice(self, index: int, deltas: Sequence[TextDelta], outcome: Outcome) -> Json:
        echo = self._job.echoed_prompts[index]
        return self._choice(index, echo + text_of(deltas), self._logprobs(deltas, len(echo)), outcome.finish)

    def _choice(self, index: int, text: str, logprobs: Json | None = None, finish: str | None = None) -> Json:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}

    def _logprobs(self, deltas: Sequence[TextDelta], offset: int) -> Json | None:
        if not self._with_logprobs:
            return None
        tokens = tokens_of(deltas)
        offsets = []
        for delta in deltas:
            if delta.token:
                offsets.append(offset)
            offset += len(delta.text)
        return {
            "tokens": [self._text(token, token.id) for token in tokens],
            "token_logprobs": [None if token.logprob is None else finite(token.logprob) for token in tokens],
            "top_logprobs": [None if token.logprob is None else self._top(token) for token in tokens],
            "text_offset": offsets,
        }

    def _top(self, token: Token) -> dict[str, float]:
        found = reversed(((token.id, token.logprob), *token.top))
        return {self._text(token, id): finite(logprob) for id, logprob in found}

    def _text(self, token: Token, id: int) -> str:
        return bytes_of(token.tokenizer or self._tokenizer, id).decode("utf-8", "replace")


def response_formatter(job: Job) -> ResponseFormatter:
    return ChatFormatter(job) if job.kind == "chat" else CompletionFormatter(job)


def answer_reader(job: Job) -> AnswerReader:
    """What finds the calls in one answer, or lets all of it pass as text."""
    tools = job.tools
    return ToolCallReader(tools.names, parallel=tools.parallel) if tools else PlainReader()


def pieces_of(reader: AnswerReader, event: Sequence[TextDelta] | Outcome) -> list[Piece]:
    """What an answer's next event releases."""
    return reader.finish() if isinstance(event, Outcome) else reader.push(text_of(event))


def call_object(call: ToolCall) -> Json:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def finish_reason(outcome: Outcome, called: bool) -> str:
    return "tool_calls" if called and outcome.finish == "stop" else outcome.finish


def text_of(deltas: Sequence[TextDelta]) -> str:
    return "".join(delta.text for delta in deltas)


def tokens_of(deltas: Sequence[TextDelta]) -> list[Token]:
    return [delta.token for delta in deltas if delta.token]


def finite(logprob: float | None) -> float:
    return MIN_LOGPROB if logprob is None else max(logprob, MIN_LOGPROB)
