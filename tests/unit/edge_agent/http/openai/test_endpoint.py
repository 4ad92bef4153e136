from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from isthmus.edge_agent.http.openai.state import LARGE_BODY_BYTES, PARSED_AT_ONCE, Limits
from isthmus.edge_agent.language.request import GenerationRequest, Summary, Token
from isthmus.edge_agent.policy.arms import Arm
from isthmus.models.errors import (
    BundleError,
    DeadlineExceeded,
    Draining,
    InvalidInput,
    LinkDown,
    Overloaded,
)
from isthmus.models.language.checkpoint.tokenizer import Tokenizer
from tests.unit.edge_agent.http.openai.api import CHAT, HI, assert_error, client, events, post
from tests.unit.edge_agent.language.scripted import ScriptedBackend, byte_tokenizer

JSON = {"content-type": "application/json"}
OTHER = byte_tokenizer()
OTHER.vocabulary = b"o" * 32


class Failing(ScriptedBackend):
    """Fails before its first token."""

    def generate(self, request: GenerationRequest, cancelled: object = None) -> Iterator[Token | Summary]:
        assert self.error
        raise self.error
        yield


@pytest.mark.parametrize("value", ["1", "true", "YES", "please"])
def test_a_header_keeps_a_request_on_the_device(value: str) -> None:
    backend = ScriptedBackend()
    post(backend, headers={"X-Isthmus-Private": value})
    post(backend, headers={"X-Isthmus-Private": "0"})
    post(backend, headers=[("X-Isthmus-Private", "0"), ("X-Isthmus-Private", value)])
    post(backend, headers={"X-Isthmus-Private": value}, model="cloud")
    assert [request.arm for request in backend.requests] == ["edge", "auto", "edge", "edge"]


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (InvalidInput("no such arm"), 400, "invalid_request_error"),
        (LinkDown("the cloud is gone"), 503, "overloaded"),
        (DeadlineExceeded("too late"), 504, "timeout"),
        (Overloaded("full"), 503, "overloaded"),
        (Draining("bye"), 503, "overloaded"),
        (BundleError("/secret/path is odd"), 500, "server_error"),
        (ZeroDivisionError("/secret/path"), 500, "server_error"),
    ],
)
def test_errors_of_the_backend_become_statuses(error: Exception, status: int, kind: str) -> None:
    for stream in (False, True):
        response = post(Failing(error=error), stream=stream)
        assert_error(response, status, type=kind)
        assert response.headers.get("retry-after") == ("1" if status == 503 else None)
        assert "secret" not in response.text


def test_an_error_in_mid_stream_is_an_event_and_ends_it() -> None:
    *chunks, last = events(ScriptedBackend("ab", error=LinkDown("the cloud is gone")))
    assert [chunk["choices"][0]["delta"].get("content") for chunk in chunks] == ["", "a", "b"]
    assert last == {
        "error": {
            "message": "the cloud is gone",
            "type": "overloaded",
            "param": None,
            "code": "cloud_unavailable",
        }
    }


def test_a_body_over_the_cap() -> None:
    api = client(ScriptedBackend(), Limits(body_bytes=1000))
    assert_error(api.post(CHAT, content=(bytes(100) for _ in range(1000)), headers=JSON), 413)
    assert_error(api.post(CHAT, content=b"\xff" * 1000, headers=JSON), 400)


def test_other_methods() -> None:
    assert_error(client(ScriptedBackend()).get(CHAT), 405)
    assert_error(client(ScriptedBackend()).put("/v1/completions", content=b"{}"), 405)
    assert client(ScriptedBackend()).get(CHAT).headers["allow"] == "POST"


def test_without_a_free_admission_slot_the_status_is_503_and_slots_are_released() -> None:
    assert_error(client(ScriptedBackend(), Limits(admitted=0)).post(CHAT, json={}), 503, type="overloaded")
    api = client(ScriptedBackend("a"), Limits(admitted=1, running=1))
    good = {"model": "auto", "messages": HI}
    codes = [api.post(CHAT, json=body).status_code for body in (good, {}, {**good, "stream": True}, good)]
    assert codes == [200, 400, 200, 200]


def test_bodies_are_parsed_few_at_a_time_off_the_event_loop() -> None:
    """While the tokenizer is busy with the first large prompt, the others wait, and the API answers."""

    def encode(text: str, **_: Any) -> list[int]:
        entered.append(text[:1])
        started.set()
        assert finish.wait(10)
        return [65]

    backend, entered, started, finish = ScriptedBackend(), list[str](), threading.Event(), threading.Event()
    backend.tokenizer.encode = encode  # type: ignore[method-assign]
    backend.context = 100_000
    with client(backend) as api, ThreadPoolExecutor(3) as threads:
        body = {"model": "edge", "prompt": "x" * (LARGE_BODY_BYTES + 1)}
        replies = [threads.submit(api.post, "/v1/completions", json=body) for _ in range(3)]
        assert started.wait(10)
        assert api.get("/v1/models").status_code == 200
        assert entered == ["x"]
        finish.set()
        assert [reply.result(10).status_code for reply in replies] == [200] * 3
    assert entered == ["x"] * 3


@pytest.mark.parametrize(
    "kind", ["text/plain", "text/plain; charset=application/json", "multipart/form-data", "application/jsonx", None]
)
@pytest.mark.parametrize("path", [CHAT, "/v1/completions"])
def test_a_content_type_that_needs_no_preflight_is_refused(path: str, kind: str | None) -> None:
    backend = ScriptedBackend()
    body = json.dumps({"model": "auto", "messages": HI, "prompt": "hi"}).encode()
    response = client(backend).post(path, content=body, headers={"content-type": kind} if kind else None)
    assert_error(response, 415, type="invalid_request_error", code="unsupported_media_type")
    assert "application/json" in response.json()["error"]["message"]
    assert backend.requests == []


def test_a_content_type_may_have_parameters_and_capitals() -> None:
    body = json.dumps({"model": "auto", "messages": HI}).encode()
    kind = {"content-type": "Application/JSON; charset=utf-8"}
    assert client(ScriptedBackend()).post(CHAT, content=body, headers=kind).status_code == 200


class Losing(ScriptedBackend):
    """Its cloud is lost with the first prompt: from then on the device answers, in another vocabulary."""

    def tokenizer_for(self, arm: Arm) -> Tokenizer:
        return OTHER if self.requests else self.tokenizer

    def generate(self, request: GenerationRequest, cancelled: object = None) -> Iterator[Token | Summary]:
        if not self.requests:
            self.requests.append(request)
            raise LinkDown("no cloud answers")
        yield from super().generate(request)


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_whose_cloud_is_lost_is_encoded_again_for_the_device(stream: bool) -> None:
    backend = Losing("yes")
    response = post(backend, stream=stream)
    assert response.status_code == 200 and "y" in response.text
    assert [request.vocabulary for request in backend.requests] == [backend.tokenizer.vocabulary, OTHER.vocabulary]
    assert_error(post(Losing("yes"), model="cloud"), 503, message="no cloud answers", type="overloaded")


class Waiting(ScriptedBackend):
    """A device without a model, whose cloud does not answer."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.waiting, self.end = threading.Semaphore(0), threading.Event()

    def tokenizer_for(self, arm: Arm) -> Tokenizer:
        self.waiting.release()
        assert self.end.wait(10)
        raise LinkDown("no cloud answered within 30 s")


def test_requests_wait_for_a_cloud_beside_each_other() -> None:
    backend, count = Waiting(), 3 * PARSED_AT_ONCE
    with client(backend) as api, ThreadPoolExecutor(count) as threads:
        replies = [threads.submit(api.post, CHAT, json={"model": "auto", "messages": HI}) for _ in range(count)]
        assert all(backend.waiting.acquire(timeout=10) for _ in range(count))
        backend.end.set()
        assert [reply.result(10).status_code for reply in replies] == [503] * count
