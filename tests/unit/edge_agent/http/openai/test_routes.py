from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.testclient import TestClient

from isthmus.edge_agent.http.openai.routes import Limits, routes
from isthmus.edge_agent.language.request import GenerationRequest, Summary, Token
from isthmus.models.errors import (
    BundleError,
    DeadlineExceeded,
    Draining,
    InvalidInput,
    LinkDown,
    Overloaded,
)
from tests.unit.edge_agent.language.scripted import Scripted

HI: Any = [{"role": "user", "content": "hi"}]
LIMITS = Limits()
CHAT = "/v1/chat/completions"
JSON = {"content-type": "application/json"}


class Failing(Scripted):
    """Fails before its first token."""

    def generate(self, ask: GenerationRequest) -> Iterator[Token | Summary]:
        assert self.error
        raise self.error
        yield


class Impossible(Scripted):
    """Sure that every one of its tokens cannot be."""

    def generate(self, ask: GenerationRequest) -> Iterator[Token | Summary]:
        for event in super().generate(ask):
            yield Token(event.id, event.source, float("-inf")) if isinstance(event, Token) else event


def client(generator: Scripted, limits: Limits = LIMITS) -> TestClient:
    return TestClient(Starlette(routes=routes(generator, limits)))


def ask(generator: Scripted, path: str = CHAT, headers: Any = None, **fields: Any) -> Any:
    prompt = {"messages": HI} if path == CHAT else {"prompt": "hi"}
    return client(generator).post(path, json={"model": "auto", **prompt, **fields}, headers=headers)


def events(generator: Scripted, path: str = CHAT, **fields: Any) -> list[Any]:
    """The data of every event, [DONE] as text."""
    reply = ask(generator, path, stream=True, **fields)
    assert reply.status_code == 200
    assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
    parts = reply.text.split("\n\n")
    assert parts.pop() == ""
    assert all(part.startswith("data: ") and "\n" not in part for part in parts)
    return [json.loads(data) if (data := part[6:]) != "[DONE]" else data for part in parts]


def assert_error(reply: Any, status: int, **expected: object) -> None:
    assert reply.status_code == status
    error = reply.json()["error"]
    assert list(error) == ["message", "type", "param", "code"]
    assert "\n" not in error["message"]
    assert {name: error[name] for name in expected} == expected


def test_a_whole_chat() -> None:
    generator = Scripted("Héllo", sources=("draft", "cloud"))
    answer = ask(generator).json()
    assert answer["id"].startswith("chatcmpl-")
    assert (answer["object"], answer["model"]) == ("chat.completion", "tiny:auto")
    assert answer["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Héllo", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    assert answer["usage"] == {
        "prompt_tokens": 19,
        "completion_tokens": 7,
        "total_tokens": 26,
        "prompt_tokens_details": {"cached_tokens": 1, "audio_tokens": 0},
        "completion_tokens_details": {
            "reasoning_tokens": 0,
            "audio_tokens": 0,
            "accepted_prediction_tokens": 4,
            "rejected_prediction_tokens": 2,
        },
    }
    assert answer["isthmus"] == {
        "arm": "auto",
        "why": "as scripted",
        "spans": [],
        "degraded": False,
        "rounds": 3,
        "bytes_up": 40,
        "bytes_down": 50,
        "rtt_ms": 25.0,
    }
    assert "isthmus" in answer["system_fingerprint"]


def test_a_streamed_chat_is_one_whole_chat_in_pieces() -> None:
    *chunks, done = events(Scripted("Hé!"))
    assert done == "[DONE]"
    assert [chunk["choices"][0]["delta"] for chunk in chunks] == [
        {"role": "assistant", "content": ""},
        {"content": "H"},
        {"content": "é"},
        {"content": "!"},
        {},
    ]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * 4 + ["stop"]
    assert len({(chunk["id"], chunk["created"], chunk["model"], chunk["object"]) for chunk in chunks}) == 1
    assert not any("usage" in chunk for chunk in chunks)
    assert ["isthmus" in chunk for chunk in chunks] == [False] * 4 + [True]


def test_usage_comes_in_a_chunk_of_its_own() -> None:
    *chunks, last, done = events(Scripted("ab"), stream_options={"include_usage": True})
    assert done == "[DONE]"
    assert [chunk["usage"] for chunk in chunks] == [None] * len(chunks)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 3
    assert last["isthmus"]["arm"] == "auto"
    assert not any("isthmus" in chunk for chunk in chunks)


def test_nothing_of_a_stop_string_is_sent() -> None:
    generator = Scripted("one STOP two", sources=("draft",))
    *chunks, _ = events(generator, stop=["STOP", "never"])
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == "one "
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    answer = ask(generator, stop="STOP").json()
    assert answer["choices"][0]["message"]["content"] == "one "
    assert answer["usage"]["completion_tokens"] == len("one STOP")
    assert answer["usage"]["completion_tokens_details"]["accepted_prediction_tokens"] == len("one STOP")
    assert answer["isthmus"]["bytes_up"] is None
    assert generator.closed.is_set()


def test_max_tokens_end_an_answer() -> None:
    answer = ask(Scripted("Hello"), max_completion_tokens=2).json()
    assert (answer["choices"][0]["message"]["content"], answer["choices"][0]["finish_reason"]) == ("He", "length")


def test_a_broken_character_at_the_end_is_replaced() -> None:
    assert ask(Scripted("aé"), max_tokens=2).json()["choices"][0]["message"]["content"] == "a\ufffd"


def test_several_answers() -> None:
    generator = Scripted("ab")
    answer = ask(generator, n=3, seed=5).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert [one.sampling.seed for one in generator.asks] == [5, 6, 7]
    assert (answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"]) == (19, 9)
    assert answer["isthmus"]["bytes_up"] == 120
    *chunks, _ = events(generator, n=2)
    assert [chunk["choices"][0]["index"] for chunk in chunks] == [0] * 4 + [1] * 4
    assert ["isthmus" in chunk for chunk in chunks] == [False] * 7 + [True]


def test_log_probabilities_of_a_chat_come_with_their_text() -> None:
    *chunks, _ = events(Scripted("é"), logprobs=True, top_logprobs=1)
    entries = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    top = [{"token": "a", "logprob": -0.5, "bytes": [97]}]
    assert entries[1]["content"] == [
        {"token": "\ufffd", "logprob": -0.5, "bytes": [0xC3], "top_logprobs": top},
        {"token": "\ufffd", "logprob": -0.5, "bytes": [0xA9], "top_logprobs": top},
    ]
    assert entries[0] is None and entries[2] is None
    whole = ask(Scripted("ab"), logprobs=True).json()["choices"][0]["logprobs"]["content"]
    assert [(entry["token"], entry["top_logprobs"]) for entry in whole] == [("a", []), ("b", [])]


def test_log_probabilities_that_json_cannot_say() -> None:
    entries = ask(Impossible("a"), logprobs=True).json()["choices"][0]["logprobs"]["content"]
    assert [entry["logprob"] for entry in entries] == [-9999.0]


def test_a_whole_completion() -> None:
    answer = ask(Scripted("aé"), "/v1/completions", prompt=["x", "hi"], echo=True).json()
    assert answer["id"].startswith("cmpl-")
    assert answer["object"] == "text_completion"
    assert answer["choices"] == [
        {"index": 0, "text": "xaé", "logprobs": None, "finish_reason": "stop"},
        {"index": 1, "text": "hiaé", "logprobs": None, "finish_reason": "stop"},
    ]
    assert answer["usage"]["prompt_tokens"] == 3


def test_a_streamed_completion() -> None:
    *chunks, done = events(Scripted("ab"), "/v1/completions", echo=True)
    assert done == "[DONE]"
    assert [chunk["choices"][0]["text"] for chunk in chunks] == ["hi", "a", "b", ""]
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    assert [chunk["choices"][0]["text"] for chunk in events(Scripted("a"), "/v1/completions")[:-1]] == ["a", ""]


def test_log_probabilities_of_a_completion() -> None:
    expected = {
        "tokens": ["x", "\ufffd", "\ufffd", "y"],
        "token_logprobs": [-0.5] * 4,
        "top_logprobs": [{"a": -0.5, "b": -1.5, text: -0.5} for text in ("x", "\ufffd", "\ufffd", "y")],
        "text_offset": [0, 1, 1, 2],
    }
    assert ask(Scripted("xéy"), "/v1/completions", logprobs=2).json()["choices"][0]["logprobs"] == expected
    *chunks, _ = events(Scripted("xéy"), "/v1/completions", logprobs=2)
    parts = [chunk["choices"][0]["logprobs"] for chunk in chunks[:-1]]
    assert {name: [one for part in parts for one in part[name]] for name in expected} == expected


def test_models_are_listed_and_described() -> None:
    listed = client(Scripted()).get("/v1/models").json()
    assert listed["object"] == "list"
    names = [entry["id"] for entry in listed["data"]]
    assert {"tiny", "auto", "edge", "cloud", "verify", "tiny:edge"} <= set(names)
    for entry in listed["data"]:
        assert client(Scripted()).get(f"/v1/models/{entry['id']}").json()["id"] == entry["id"]
    assert_error(client(Scripted(cloud=False)).get("/v1/models/cloud"), 404, code="model_not_found")
    named = Scripted(name="lab/tiny")
    assert client(named).get("/v1/models/lab/tiny:edge").json()["id"] == "lab/tiny:edge"


@pytest.mark.parametrize("value", ["1", "true", "YES", "please"])
def test_a_header_keeps_a_request_on_the_device(value: str) -> None:
    generator = Scripted()
    ask(generator, headers={"X-Isthmus-Private": value})
    ask(generator, headers={"X-Isthmus-Private": "0"})
    ask(generator, headers=[("X-Isthmus-Private", "0"), ("X-Isthmus-Private", value)])
    assert [one.arm for one in generator.asks] == ["edge", "auto", "edge"]
    assert_error(ask(generator, headers={"X-Isthmus-Private": value}, model="cloud"), 400, param="model")


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
def test_what_the_prompt_loop_raises(error: Exception, status: int, kind: str) -> None:
    for stream in (False, True):
        reply = ask(Failing(error=error), stream=stream)
        assert_error(reply, status, type=kind)
        assert reply.headers.get("retry-after") == ("1" if status == 503 else None)
        assert "secret" not in reply.text


def test_a_failure_in_mid_stream_is_an_event_and_ends_it() -> None:
    *chunks, last = events(Scripted("ab", error=LinkDown("the cloud is gone")))
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
    api = client(Scripted(), Limits(body_bytes=1000))
    assert_error(api.post(CHAT, content=(bytes(100) for _ in range(1000)), headers=JSON), 413)
    assert_error(api.post(CHAT, content=b"\xff" * 1000, headers=JSON), 400)


def test_other_methods() -> None:
    assert_error(client(Scripted()).get(CHAT), 405)
    assert_error(client(Scripted()).put("/v1/completions", content=b"{}"), 405)


def test_a_full_house_says_so_and_places_are_given_back() -> None:
    assert_error(client(Scripted(), Limits(waiting=0)).post(CHAT, json={}), 503, type="overloaded")
    api = client(Scripted("a"), Limits(waiting=1, computing=1))
    good = {"model": "auto", "messages": HI}
    codes = [api.post(CHAT, json=body).status_code for body in (good, {}, {**good, "stream": True}, good)]
    assert codes == [200, 400, 200, 200]


@pytest.mark.parametrize(
    "kind", ["text/plain", "text/plain; charset=application/json", "multipart/form-data", "application/jsonx", None]
)
@pytest.mark.parametrize("path", [CHAT, "/v1/completions"])
def test_what_a_web_page_may_post_without_a_preflight_is_refused(path: str, kind: str | None) -> None:
    generator = Scripted()
    body = json.dumps({"model": "auto", "messages": HI, "prompt": "hi"}).encode()
    reply = client(generator).post(path, content=body, headers={"content-type": kind} if kind else None)
    assert_error(reply, 415, type="invalid_request_error", code="unsupported_media_type")
    assert "application/json" in reply.json()["error"]["message"]
    assert generator.asks == []


def test_a_content_type_may_have_parameters_and_capitals() -> None:
    body = json.dumps({"model": "auto", "messages": HI}).encode()
    kind = {"content-type": "Application/JSON; charset=utf-8"}
    assert client(Scripted()).post(CHAT, content=body, headers=kind).status_code == 200
