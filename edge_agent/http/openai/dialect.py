"""What an API for prompts is to its endpoint: bodies to jobs, and a job's events to a response or a stream."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from isthmus.edge_agent.http.openai.errors import ApiError
from isthmus.edge_agent.http.openai.jobs import Job, JobParser
from isthmus.edge_agent.http.openai.responses import response_formatter
from isthmus.edge_agent.http.openai.streaming import ChoiceEvent, collect_response, server_sent_event, stream_chunks
from isthmus.edge_agent.language.request import GenerationBackend

EVENT_STREAM = b"text/event-stream; charset=utf-8"


class Dialect(Protocol):
    """`media_type`: of a stream."""

    @property
    def media_type(self) -> bytes: ...

    def parse(self, data: bytes, private: bool, backend: GenerationBackend, /) -> Job:
        """The job of a body. Raises ApiError."""

    async def collect(self, job: Job, events: AsyncIterator[ChoiceEvent]) -> dict[str, Any]:
        """The body of a response that is no stream."""

    def stream(self, job: Job, events: AsyncIterator[ChoiceEvent]) -> AsyncGenerator[bytes, None]:
        """The parts of a stream; the first comes only after the first event, so that errors come before."""

    def stream_error(self, error: ApiError) -> bytes:
        """The last part of a stream that fails."""

    def error_body(self, error: ApiError) -> dict[str, Any]: ...


@dataclass(frozen=True)
class OpenAiDialect:
    """Of /v1/chat/completions and /v1/completions."""

    parser: JobParser
    media_type: ClassVar[bytes] = EVENT_STREAM

    def parse(self, data: bytes, private: bool, backend: GenerationBackend, /) -> Job:
        return self.parser(data, private, backend)

    async def collect(self, job: Job, events: AsyncIterator[ChoiceEvent]) -> dict[str, Any]:
        return await collect_response(response_formatter(job), job, events)

    def stream(self, job: Job, events: AsyncIterator[ChoiceEvent]) -> AsyncGenerator[bytes, None]:
        return stream_chunks(response_formatter(job), job, events)

    def stream_error(self, error: ApiError) -> bytes:
        return server_sent_event(self.error_body(error))

    def error_body(self, error: ApiError) -> dict[str, Any]:
        return {"error": error.error}
