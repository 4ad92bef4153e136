from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from contextlib import aclosing

import pytest

from isthmus.edge_agent.http.openai.responses import response_formatter
from isthmus.edge_agent.http.openai.streaming import (
    ChoiceEvent,
    collect_response,
    generate_choices,
    in_thread,
    server_sent_event,
    stream_chunks,
)
from isthmus.edge_agent.language.detokenize import Outcome, TextDelta
from isthmus.edge_agent.language.request import Token
from isthmus.models.language.checkpoint import gguf_tokenizer
from tests.bench.tiny_sentencepiece import gguf_fields
from tests.unit.edge_agent.http.openai.bodies import chat, completion
from tests.unit.edge_agent.language.scripted import ScriptedBackend

HELLO = (TextDelta(Token(104, "edge"), "h"),)
END = Outcome("stop", 1, 0, None)


class Events:
    """Choice events without end, or with an error after `count` of them, which remember their threads."""

    def __init__(self, count: int | None = None) -> None:
        self.count = count
        self.threads: set[int] = set()
        self.closed = False

    def __call__(self) -> Iterator[ChoiceEvent]:
        sent = 0
        try:
            while sent != self.count:
                self.threads.add(threading.get_ident())
                sent += 1
                yield 0, HELLO
            raise ZeroDivisionError
        finally:
            self.threads.add(threading.get_ident())
            self.closed = True


async def from_list(events: Sequence[ChoiceEvent]) -> AsyncGenerator[ChoiceEvent, None]:
    for event in events:
        yield event


async def collect(chunks: AsyncIterator[bytes]) -> list[bytes]:
    return [chunk async for chunk in chunks]


def test_a_chat_begins_without_sentencepieces_space_and_a_completion_with_it() -> None:
    fields = {**gguf_fields(), "tokenizer.chat_template": "{{ messages[0].content }}"}
    backend = ScriptedBackend("#d", tokenizer=gguf_tokenizer.read(fields))  # <0x20>, <0x61>
    texts = {}
    for make in (chat, completion):
        events = generate_choices(backend, make(backend=backend, max_tokens=2), threading.Event())
        deltas = [event for _, event in events if not isinstance(event, Outcome)]
        texts[make] = "".join(delta.text for each in deltas for delta in each)
    assert texts == {chat: "a", completion: " a"}


def test_the_choices_follow_one_another() -> None:
    backend = ScriptedBackend("a")
    events = list(generate_choices(backend, chat(backend=backend, n=2), threading.Event()))
    assert [index for index, event in events if isinstance(event, Outcome)] == [0, 1]
    assert [index for index, _ in events] == sorted(index for index, _ in events)
    assert len(backend.requests) == 2


def test_closing_the_choices_closes_the_backends_generator() -> None:
    backend = ScriptedBackend("ab", endless=True)
    events = generate_choices(backend, chat(backend=backend), threading.Event())
    next(events)
    assert not backend.closed.is_set()
    events.close()  # type: ignore[attr-defined]
    assert backend.closed.is_set()


def test_closing_early_closes_the_events_in_their_one_worker_thread() -> None:
    events = Events()

    async def read_one() -> ChoiceEvent:
        async with aclosing(in_thread(events(), threading.Event())) as stream:
            return await anext(stream)

    assert asyncio.run(read_one()) == (0, HELLO)
    assert events.closed
    assert len(events.threads) == 1 and threading.get_ident() not in events.threads


def test_an_error_of_the_events_is_raised_after_those_before_it() -> None:
    received = []

    async def read() -> None:
        async for event in in_thread(Events(count=3)(), threading.Event()):
            received.append(event)

    with pytest.raises(ZeroDivisionError):
        asyncio.run(read())
    assert received == [(0, HELLO)] * 3


def test_a_response_and_its_stream_have_the_same_choices() -> None:
    job = chat(n=2)
    events: list[ChoiceEvent] = [(0, HELLO), (0, HELLO), (0, END), (1, HELLO), (1, ()), (1, END)]
    formatter = response_formatter(job)
    response = asyncio.run(collect_response(formatter, job, from_list(events)))
    assert [choice["message"]["content"] for choice in response["choices"]] == ["hh", "h"]  # type: ignore[attr-defined]
    chunks = asyncio.run(collect(stream_chunks(formatter, job, from_list(events))))
    assert [chunk.count(b'"content": "h"') for chunk in chunks] == [0, 1, 1, 0, 0, 1, 0, 0]
    assert chunks[-1] == b"data: [DONE]\n\n"


def test_nothing_is_streamed_before_the_first_event() -> None:
    async def failing() -> AsyncGenerator[ChoiceEvent, None]:
        raise ZeroDivisionError
        yield

    formatter = response_formatter(chat())
    with pytest.raises(ZeroDivisionError):
        asyncio.run(anext(stream_chunks(formatter, chat(), failing())))  # type: ignore[arg-type]


def test_a_server_sent_event_is_one_line_of_json() -> None:
    assert server_sent_event({"text": "é\n"}) == 'data: {"text": "é\\n"}\n\n'.encode()
    with pytest.raises(ValueError, match="JSON"):
        server_sent_event({"logprob": float("-inf")})
