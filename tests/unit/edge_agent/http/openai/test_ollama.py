"""Ollama's three endpoints."""

from __future__ import annotations

import json
from typing import Any

import pytest

from isthmus.models.errors import LinkDown
from isthmus.models.messages import Grammar
from tests.unit.edge_agent.http.openai.api import HI, client
from tests.unit.edge_agent.language.scripted import ScriptedBackend

CALL = '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'
ADD = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


def post(backend: ScriptedBackend, path: str = "chat", **fields: Any) -> Any:
    prompt = {"messages": HI} if path == "chat" else {"prompt": "hi"}
    return client(backend).post(f"/api/{path}", json={"model": "auto", **prompt, **fields})


def lines(backend: ScriptedBackend, path: str = "chat", **fields: Any) -> list[Any]:
    response = post(backend, path, **fields)
    assert response.headers["content-type"] == "application/x-ndjson"
    return [json.loads(line) for line in response.text.splitlines()]


def test_a_chat_is_a_stream_of_lines_by_default() -> None:
    *parts, last = lines(ScriptedBackend("Hé"))
    assert [part["message"]["content"] for part in parts] == ["H", "é"]
    assert [part["done"] for part in [*parts, last]] == [False, False, True]
    assert (last["done_reason"], last["prompt_eval_count"], last["eval_count"]) == ("stop", 19, 4)
    assert last["total_duration"] >= last["eval_duration"] >= 0


def test_whole_answers() -> None:
    answer = post(ScriptedBackend("Hello"), stream=False, options={"num_predict": 2, "temperature": 0}).json()
    assert (answer["message"]["content"], answer["done_reason"]) == ("He", "length")
    answer = post(ScriptedBackend("Hello"), "generate", stream=False, system="Be brief.").json()
    assert (answer["response"], answer["prompt_eval_count"]) == ("Hello", len("[system]Be brief.[user]hi[assistant]"))


def test_raw_text_is_continued() -> None:
    backend = ScriptedBackend("ab")
    assert post(backend, "generate", raw=True, stream=False).json()["response"] == "ab"
    assert bytes(backend.requests[0].prompt) == b"hi"


def test_calls_have_arguments_as_objects() -> None:
    backend = ScriptedBackend(CALL, context=4000)
    answer = post(backend, tools=[ADD], stream=False).json()
    assert answer["message"]["tool_calls"] == [{"function": {"name": "add", "arguments": {"a": 1}}}]
    said = answer["message"]
    again = post(backend, messages=[*HI, said, {"role": "tool", "content": "2", "tool_name": "add"}], stream=False)
    assert again.status_code == 200
    assert b"<tool_response>\n2\n" in bytes(backend.requests[-1].prompt)


def test_formats_are_grammars() -> None:
    backend = ScriptedBackend("{}")
    for format, expected in (
        ("", None),
        ("json", Grammar("json_object")),
        ({"x": 1}, Grammar("json_schema", '{"x": 1}')),
    ):
        assert post(backend, format=format).status_code == 200
        assert backend.requests[-1].sampling.grammar == expected


@pytest.mark.parametrize(
    ("path", "fields", "words"),
    [
        ("chat", {"model": "llama3"}, "the model 'llama3' does not exist"),
        ("chat", {"think": True}, "think is not supported"),
        ("chat", {"options": {"top_k": 40}}, "top_k is not supported"),
        ("chat", {"options": []}, "options: expected an object"),
        ("chat", {"messages": [{"role": "user", "content": "x", "images": ["aaaa"]}]}, "images is not supported"),
        ("chat", {"messages": "hi"}, "messages: "),
        ("chat", {"messages": [3]}, "messages[0]: "),
        ("chat", {"format": [1]}, "schema"),
        ("generate", {"prompt": 3}, "messages[0].content: "),
        ("generate", {"context": [1, 2]}, "context is not supported"),
    ],
)
def test_what_is_not_supported_is_refused(path: str, fields: dict[str, Any], words: str) -> None:
    response = post(ScriptedBackend(), path, **fields)
    assert response.status_code in (400, 404)
    assert words in response.json()["error"]


def test_an_error_in_a_stream_is_its_last_line() -> None:
    assert lines(ScriptedBackend("ab", error=LinkDown("gone")))[-1] == {"error": "gone"}


def test_models_are_listed() -> None:
    names = [model["name"] for model in client(ScriptedBackend()).get("/api/tags").json()["models"]]
    assert {"auto", "edge", "tiny"} <= set(names)
