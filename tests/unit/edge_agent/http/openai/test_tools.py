"""Tools of a request: what the prompt says, what an answer has to be, and how calls are sent."""

from __future__ import annotations

import json
from typing import Any

import pytest

from isthmus.edge_agent.http.openai.errors import ApiError
from isthmus.edge_agent.http.openai.tools import relocated
from isthmus.models.messages import Grammar
from tests.unit.edge_agent.http.openai.api import events, post
from tests.unit.edge_agent.http.openai.bodies import HI, chat
from tests.unit.edge_agent.language.scripted import ScriptedBackend

SCHEMA: Any = {"type": "object", "properties": {"a": {"$ref": "#/$defs/n"}}, "$defs": {"n": {"type": "integer"}}}
ADD: Any = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": SCHEMA}}
NOW: Any = {"type": "function", "function": {"name": "now"}}
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
NAMED = {"type": "function", "function": {"name": "add"}}


def big(text: str = CALL) -> ScriptedBackend:
    return ScriptedBackend(text, context=4000)


def grammar_of(**fields: Any) -> Grammar | None:
    return chat(backend=big(), **fields).requests[0].sampling.grammar


def test_the_prompt_holds_the_tools_unless_none_may_be_called() -> None:
    prompt = bytes(chat(backend=big(), tools=[ADD]).requests[0].prompt).decode()
    assert prompt.startswith("[system]You can call functions.")
    assert json.dumps(ADD) in prompt
    assert prompt.endswith("[user]hi[assistant]")
    for fields in ({"tools": [ADD], "tool_choice": "none"}, {"tools": []}):
        assert bytes(chat(backend=big(), **fields).requests[0].prompt) == b"[user]hi[assistant]"


def test_calls_and_results_are_parts_of_the_conversation() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a":1}'}}
    said = {"role": "assistant", "content": None, "tool_calls": [call]}
    result = {"role": "tool", "tool_call_id": "c1", "content": "1"}
    prompt = bytes(chat(backend=big(), messages=[*HI, said, result]).requests[0].prompt).decode()
    assert prompt == (
        '[user]hi[assistant]<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
        "[user]<tool_response>\n1\n</tool_response>[assistant]"
    )


def test_an_answer_that_has_to_be_a_call_has_a_grammar() -> None:
    assert grammar_of(tools=[ADD, NOW]) is None
    named = grammar_of(tools=[ADD, NOW], tool_choice=NAMED)
    assert named is not None and named.kind == "json_schema"
    schema = json.loads(named.text)
    assert schema["properties"]["name"] == {"const": "add"}
    assert schema["properties"]["arguments"]["properties"]["a"] == {"$ref": "#/properties/arguments/$defs/n"}
    required = grammar_of(tools=[ADD, NOW], tool_choice="required")
    assert required is not None
    one, other = json.loads(required.text)["anyOf"]
    assert one["properties"]["arguments"]["properties"]["a"]["$ref"] == "#/anyOf/0/properties/arguments/$defs/n"
    assert other["properties"]["arguments"] == {"type": "object", "properties": {}, "additionalProperties": False}


def test_references_elsewhere_and_other_values_stay() -> None:
    schema = [{"$ref": "https://x"}, {"$ref": 3}, {"enum": ["$ref", None]}]
    assert relocated(schema, "#/x") == schema


def test_formats_are_grammars() -> None:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}, "strict": True}}
    assert grammar_of(response_format={"type": "text"}) is None
    assert grammar_of(response_format={"type": "json_object"}) == Grammar("json_object")
    assert grammar_of(response_format=form) == Grammar("json_schema", '{"type": "object"}')
    with pytest.raises(ApiError, match="state tool_choice") as caught:
        grammar_of(response_format=form, tools=[ADD])
    assert caught.value.error["param"] == "response_format"
    assert grammar_of(response_format=form, tools=[ADD], tool_choice="none") == Grammar(
        "json_schema", '{"type": "object"}'
    )


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [ADD, ADD]}, "tools"),
        ({"tools": [{"type": "custom"}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "function", "function": {"name": "a\n"}}]}, "tools[0].function.name"),
        (
            {"tools": [{"type": "function", "function": {"name": "a", "parameters": []}}]},
            "tools[0].function.parameters",
        ),
        ({"tools": [{"type": "function", "function": {"name": "a", "parameters": {"x": "y" * 300_000}}}]}, "tools"),
        ({"tools": [NOW], "tool_choice": NAMED}, "tool_choice"),
        ({"tool_choice": {"type": "function"}, "tools": [NOW]}, "tool_choice"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"x": "y" * 70_000}}}},
            "response_format.json_schema.schema",
        ),
    ],
)
def test_what_cannot_be_is_refused_by_field(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as caught:
        chat(**fields)
    assert (caught.value.status, caught.value.error["param"]) == (400, param)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_a_whole_answer_with_a_call() -> None:
    choice = post(big(f"Adding.\n{CALL}"), tools=[ADD]).json()["choices"][0]
    (call,) = choice["message"]["tool_calls"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == "Adding."
    assert (call["type"], call["function"]) == ("function", {"name": "add", "arguments": '{"a": 1}'})
    assert post(big(), tools=[ADD]).json()["choices"][0]["message"]["content"] is None


def test_a_streamed_call_is_its_name_and_then_its_arguments() -> None:
    *chunks, done = events(big(f"Ok {CALL}{CALL}"), tools=[ADD])
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert "".join(delta.get("content", "") for delta in deltas) == "Ok"
    calls = [delta["tool_calls"][0] for delta in deltas if "tool_calls" in delta]
    assert [call["index"] for call in calls] == [0, 0, 1, 1]
    assert calls[0]["function"] == {"name": "add", "arguments": ""}
    assert calls[1] == {"index": 0, "function": {"arguments": '{"a": 1}'}}
    assert calls[0]["id"] != calls[2]["id"]
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"
    assert done == "[DONE]"


def test_what_is_no_call_is_text() -> None:
    text = '<tool_call>{"name": "sub", "arguments": {}}</tool_call>'
    choice = post(big(text), tools=[ADD]).json()["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == (text, "stop")
    *chunks, _ = events(big(text), tools=[ADD])
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == text


def test_the_only_call_ends_the_answer() -> None:
    backend = big(f"{CALL} and on and on")
    answer = post(backend, tools=[ADD], parallel_tool_calls=False).json()
    assert len(answer["choices"][0]["message"]["tool_calls"]) == 1
    assert answer["usage"]["completion_tokens"] == len(CALL)


def test_log_probabilities_of_a_call_are_sent_with_it() -> None:
    *chunks, _ = events(big(CALL), tools=[ADD], logprobs=True)
    entries = [entry for chunk in chunks if (found := chunk["choices"][0]["logprobs"]) for entry in found["content"]]
    assert "".join(entry["token"] for entry in entries) == CALL


def test_biases_and_penalties_reach_the_sampling() -> None:
    sampling = (
        chat(logit_bias={"65": 5, "7": -100, "9": 0}, frequency_penalty=0.5, presence_penalty=-1).requests[0].sampling
    )
    assert sampling.logit_bias == ((7, -100.0), (65, 5.0))
    assert (sampling.frequency_penalty, sampling.presence_penalty) == (0.5, -1.0)


def test_a_prediction_is_tokens_without_special_ones() -> None:
    content = [{"type": "text", "text": "ab"}, {"type": "text", "text": "<|im_end|>"}]
    request = chat(prediction={"type": "content", "content": content}).requests[0]
    assert bytes(request.prediction) == b"ab\n<|im_end|>"
    with pytest.raises(ApiError) as caught:
        chat(prediction={"type": "content", "content": "x" * 4000})
    assert caught.value.error["code"] == "context_length_exceeded"
