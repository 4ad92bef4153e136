"""POST /v1/responses: bodies as chats, response objects, and the events of a stream."""

from __future__ import annotations

import json
from typing import Any

import pytest

from isthmus.edge_agent.http.openai.errors import ApiError
from isthmus.edge_agent.http.openai.jobs import Job
from isthmus.edge_agent.http.openai.responses_body import response_job
from isthmus.models.errors import LinkDown
from isthmus.models.messages import Grammar
from tests.unit.edge_agent.http.openai.api import assert_error, client
from tests.unit.edge_agent.language.scripted import ScriptedBackend

CALL = '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'
ADD = {"type": "function", "name": "add", "parameters": {"type": "object"}, "strict": True}


def job(**fields: Any) -> Job:
    body = {"model": "auto", "input": "hi", **fields}
    return response_job(json.dumps(body).encode(), False, ScriptedBackend(context=4000))


def prompt(**fields: Any) -> str:
    return bytes(job(**fields).requests[0].prompt).decode()


def post(backend: ScriptedBackend, **fields: Any) -> Any:
    return client(backend).post("/v1/responses", json={"model": "auto", "input": "hi", **fields})


def events(backend: ScriptedBackend, **fields: Any) -> list[Any]:
    parts = post(backend, stream=True, **fields).text.split("\n\n")
    assert parts.pop() == ""
    found = []
    for part in parts:
        name, data = part.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    return found


def test_input_and_instructions_are_a_conversation() -> None:
    assert prompt() == "[user]hi[assistant]"
    items = [
        {"role": "user", "content": [{"type": "input_text", "text": "a"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "b", "annotations": []}]},
        {"type": "function_call", "call_id": "1", "name": "add", "arguments": "{}"},
        {"type": "function_call", "call_id": "2", "name": "add", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "1", "output": "x"},
    ]
    call = '<tool_call>\n{"name": "add", "arguments": {}}\n</tool_call>'
    assert prompt(input=items, instructions="Be brief.") == (
        f"[system]Be brief.[user]a[assistant]b[assistant]{call}\n{call}"
        "[user]<tool_response>\nx\n</tool_response>[assistant]"
    )


def test_limits_and_formats_are_those_of_a_chat() -> None:
    form = {"type": "json_schema", "name": "x", "schema": {"type": "object"}, "strict": True}
    request = job(max_output_tokens=7, temperature=0.5, top_p=0.4, text={"format": form}).requests[0]
    assert (request.max_tokens, request.sampling.temperature, request.sampling.top_p) == (7, 0.5, 0.4)
    assert request.sampling.grammar == Grammar("json_schema", '{"type": "object"}')
    assert job(tools=[ADD], tool_choice={"type": "function", "name": "add"}).requests[0].sampling.grammar
    assert job(text={"format": {"type": "text"}}, store=True, metadata={"a": "b"}).requests[0].sampling.grammar is None


CALLED = {"type": "function_call", "call_id": "a", "name": "add", "arguments": "{}"}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": [3]}, "input[0]"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
        ({"input": [{"type": ["x"]}]}, "input[0].type"),
        ({"input": [{"role": "user"}], "instructions": "x"}, "input[0].content"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content"),
        ({"input": [CALLED, CALLED, {"role": "user"}], "instructions": "x"}, "input[2].content"),
        ({"input": [{"role": "user", "content": "x"}, CALLED, CALLED, {"role": "user"}]}, "input[3].content"),
        ({"instructions": 3}, "instructions"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"background": True}, "background"),
        ({"reasoning": {"effort": "low"}}, "reasoning"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": 3}, "tools"),
        ({"text": "x"}, "text"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
        ({"text": {"format": {"type": "json_schema", "schema": {}}}}, "text.format.name"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
    ],
)
def test_what_is_not_supported_is_refused_by_its_own_name(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as caught:
        job(**fields)
    assert caught.value.error["param"] == param
    assert str(caught.value.error["message"]).startswith(param)


def test_a_response() -> None:
    answer = post(ScriptedBackend("Hé"), instructions="Be brief.").json()
    assert (answer["object"], answer["status"], answer["store"]) == ("response", "completed", False)
    (message,) = answer["output"]
    assert message["content"] == [{"type": "output_text", "text": "Hé", "annotations": [], "logprobs": []}]
    assert answer["usage"]["output_tokens"] == 4
    assert answer["instructions"] == "Be brief."
    short = post(ScriptedBackend("Hello"), max_output_tokens=2).json()
    assert (short["status"], short["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})


def test_the_events_of_a_text() -> None:
    found = events(ScriptedBackend("ab"))
    assert [event["type"].removeprefix("response.") for event in found] == [
        *("created", "in_progress", "output_item.added", "content_part.added"),
        *("output_text.delta", "output_text.delta", "output_text.done", "content_part.done"),
        *("output_item.done", "completed"),
    ]
    assert [event["sequence_number"] for event in found] == list(range(10))
    assert found[-1]["response"]["output"][0]["content"][0]["text"] == "ab"
    assert found[0]["response"]["id"] == found[-1]["response"]["id"]


def test_the_events_of_a_text_and_a_call() -> None:
    found = events(ScriptedBackend(f"Ok {CALL}", context=4000), tools=[ADD])
    assert [event["output_index"] for event in found if event["type"] == "response.output_item.done"] == [0, 1]
    (done,) = [event for event in found if event["type"] == "response.function_call_arguments.done"]
    assert (done["name"], done["arguments"]) == ("add", '{"a": 1}')
    message, call = found[-1]["response"]["output"]
    assert message["content"][0]["text"] == "Ok"
    assert (call["type"], call["name"], call["status"]) == ("function_call", "add", "completed")


def test_errors() -> None:
    assert_error(post(ScriptedBackend(), model="gpt-4"), 404, code="model_not_found")
    assert_error(client(ScriptedBackend()).post("/v1/embeddings", json={}), 404, code="unsupported_endpoint")
    last = events(ScriptedBackend("ab", error=LinkDown("gone")))[-1]
    assert (last["type"], last["message"], last["code"]) == ("error", "gone", "cloud_unavailable")
