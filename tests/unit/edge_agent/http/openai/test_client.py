"""OpenAI's own client against the API on a real server."""

from __future__ import annotations

import socket
import threading
import time
from typing import Any

import httpx
import openai
import pytest
import uvicorn
from starlette.applications import Starlette

from isthmus.edge_agent.http.openai.routes import routes
from isthmus.edge_agent.http.openai.state import Limits
from isthmus.models.errors import LinkDown
from tests.unit.edge_agent.language.scripted import ScriptedBackend

HI: Any = [{"role": "user", "content": "hi"}]
LIMITS = Limits()


class Served:
    """The API of a backend, served by uvicorn on a free port."""

    def __init__(self, backend: ScriptedBackend, limits: Limits = LIMITS) -> None:
        self.backend = backend
        app = Starlette(routes=routes(backend, limits))
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}/v1"
        self._server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off"))
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._socket]}, daemon=True)
        self.client = openai.OpenAI(base_url=self.url, api_key="none", max_retries=0, timeout=10)

    def __enter__(self) -> Served:
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()
        self._server.should_exit = True
        self._thread.join(10)
        assert not self._thread.is_alive()


def test_openai_reads_a_chat_response() -> None:
    with Served(ScriptedBackend("Hi there", sources=("edge", "draft"))) as served:
        answer = served.client.chat.completions.create(model="auto", messages=HI, logprobs=True, top_logprobs=2)
    assert answer.choices[0].message.content == "Hi there"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage and answer.usage.completion_tokens_details
    assert answer.usage.completion_tokens_details.accepted_prediction_tokens == 4
    assert answer.choices[0].logprobs and answer.choices[0].logprobs.content
    assert answer.choices[0].logprobs.content[0].top_logprobs[0].token == "a"
    assert answer.model_extra and answer.model_extra["isthmus"]["arm"] == "auto"


def test_openai_reads_a_stream() -> None:
    with Served(ScriptedBackend("Grüße")) as served:
        stream = served.client.chat.completions.create(
            model="edge", messages=HI, stream=True, stream_options={"include_usage": True}
        )
        chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "Grüße"
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].usage and chunks[-1].usage.total_tokens == 19 + 8
    assert len(served.backend.threads) == 1


def test_openai_reads_completions_and_models() -> None:
    with Served(ScriptedBackend("abc")) as served:
        answer = served.client.completions.create(model="tiny", prompt=["x", "y"], logprobs=1, stop="c")
        stream = served.client.completions.create(model="tiny", prompt="x", stream=True)
        text = "".join(chunk.choices[0].text for chunk in stream)
        names = [entry.id for entry in served.client.models.list()]
        one = served.client.models.retrieve("tiny:edge")
    assert [choice.text for choice in answer.choices] == ["ab", "ab"]
    assert answer.choices[0].logprobs and answer.choices[0].logprobs.tokens == ["a", "b"]
    assert text == "abc"
    assert one.id in names


def test_openai_maps_our_errors() -> None:
    with Served(ScriptedBackend("ab", cloud=False, error=LinkDown("gone"))) as served:
        create = served.client.chat.completions.create
        with pytest.raises(openai.BadRequestError) as bad:
            create(model="auto", messages=HI, temperature=3)
        with pytest.raises(openai.NotFoundError) as missing:
            create(model="cloud", messages=HI)
        with pytest.raises(openai.NotFoundError):
            served.client.models.retrieve("gpt-4")
        with pytest.raises(openai.InternalServerError, match="gone"):
            create(model="auto", messages=HI)
        with pytest.raises(openai.APIError, match="gone"):
            list(create(model="auto", messages=HI, stream=True))
    assert bad.value.param == "temperature"
    assert missing.value.code == "model_not_found"


def test_openai_tells_a_prompt_that_is_too_long_from_other_errors() -> None:
    with Served(ScriptedBackend("ab")) as served, pytest.raises(openai.BadRequestError) as caught:
        served.client.chat.completions.create(model="edge", messages=[{"role": "user", "content": "x" * 300}])
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "messages")


def test_openai_sends_back_what_an_assistant_said_even_nothing() -> None:
    with Served(ScriptedBackend("ab")) as served:
        first = served.client.chat.completions.create(model="edge", messages=HI)
        said = first.choices[0].message.to_dict()
        for message in (said, {**said, "content": None}):
            again = served.client.chat.completions.create(model="edge", messages=[*HI, message, *HI])  # type: ignore[list-item]
            assert again.choices[0].message.content == "ab"


def test_an_answer_that_waits_for_its_cloud_leaves_the_device_to_others() -> None:
    slow = ScriptedBackend("ab", endless=True, pause_s=0.02, context=100_000)
    with Served(slow, Limits(running=1)) as served:
        stream = served.client.chat.completions.create(model="cloud", messages=HI, stream=True)
        next(stream)
        answer = served.client.chat.completions.create(model="edge", messages=HI, max_tokens=2)
        assert answer.usage and answer.usage.completion_tokens == 2
        stream.close()


def test_a_client_that_closes_a_stream_early_closes_the_generator() -> None:
    with Served(ScriptedBackend("ab", endless=True, pause_s=0.02, context=100_000)) as served:
        stream = served.client.chat.completions.create(model="auto", messages=HI, stream=True)
        next(stream)
        assert not served.backend.closed.is_set()
        stream.close()
        assert served.backend.closed.wait(1)
        assert len(served.backend.threads) == 1


def test_a_client_that_leaves_before_the_response_closes_the_generator() -> None:
    with Served(ScriptedBackend("ab", endless=True, pause_s=0.02, context=100_000)) as served:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{served.url}/chat/completions", json={"model": "auto", "messages": HI}, timeout=0.3)
        assert served.backend.started.is_set()
        assert served.backend.closed.wait(1)


def test_a_client_that_disconnects_while_waiting_is_never_generated_for() -> None:
    slow = ScriptedBackend("ab", endless=True, pause_s=0.02, context=100_000)
    with Served(slow, Limits(admitted=2, running=1)) as served:
        stream = served.client.chat.completions.create(model="auto", messages=HI, stream=True)
        next(stream)
        body = {"model": "auto", "messages": HI}
        for _ in range(3):
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(f"{served.url}/chat/completions", json=body, timeout=0.2)
            time.sleep(0.1)
        assert len(slow.requests) == 1
        stream.close()
        assert slow.closed.wait(1)


def test_a_stream_holds_its_admission_slot() -> None:
    slow = ScriptedBackend("ab", endless=True, pause_s=0.02, context=100_000)
    with Served(slow, Limits(admitted=1)) as served:
        with served.client.chat.completions.create(model="auto", messages=HI, stream=True) as stream:
            next(iter(stream))
            with pytest.raises(openai.InternalServerError) as caught:
                served.client.chat.completions.create(model="auto", messages=HI)
        assert caught.value.status_code == 503
        assert caught.value.response.headers["retry-after"] == "1"
