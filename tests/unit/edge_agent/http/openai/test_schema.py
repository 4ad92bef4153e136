from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.edge_agent.http.openai import schema
from isthmus.edge_agent.http.openai.chat_jobs import chat_job
from isthmus.edge_agent.http.openai.completion_jobs import completion_job
from isthmus.edge_agent.http.openai.errors import ApiError
from isthmus.edge_agent.http.openai.jobs import JobParser
from tests.unit.edge_agent.http.openai.bodies import BACKEND, HI, chat, completion

WRONG: dict[str, list[Any]] = {
    "tools": [{}, [{}] * 129],
    "functions": [[{}]],
    "tool_choice": ["required", "any", {"type": "function", "function": {"name": "f"}}, {"type": "allowed_tools"}, 3],
    "response_format": ["json", []],
    "logit_bias": [{"257": 1}, dict.fromkeys(map(str, range(301)), 1), {"a\nb": 1}, {"1" * 5000: 1}, []],
    "frequency_penalty": [2.1, "high"],
    "presence_penalty": [-3],
    "prediction": ["text"],
    "audio": [{"voice": "x"}],
    "modalities": [["text", "audio"]],
    "suffix": ["end"],
    "n": [0, 9, True, "2"],
    "temperature": [2.1, "hot"],
    "top_p": [-0.1],
    "max_tokens": [0, 1.5],
    "max_completion_tokens": [-1],
    "stop": [["a", "b", "c", "d", "e"], 3],
    "seed": [1 << 63, 10**4000],
    "stream": ["yes"],
    "stream_options": [[]],
    "logprobs": [1],
    "top_logprobs": [3],
    "private": ["yes"],
    "messages": [[], "hi"],
    "model": [3],
}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
BROKEN = [
    *(b"", b"{", b"\xff", b"[]", b"3", b'"x"', b'{"a":NaN}', b'{"a":1} x'),
    b'{"model":"\\ud800"}',
    b'{"model":"\xed\xa0\x80"}',
    b'{"a":' * 5000,
    b"[" * 100_000,
    b'{"seed":' + b"9" * 100_000 + b"}",
    b'{"model":"auto","prompt":"x","messages":[{"role":"user","content":"x"}],"temperature":1e999}',
]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
FIELDS = sorted(schema.ChatRequest.model_fields | schema.CompletionRequest.model_fields)
NAMES = st.sampled_from([*FIELDS, *schema.NEUTRAL_VALUES, "else"])
NEARLY = st.one_of(
    JSON,
    st.sampled_from(["auto", "edge", "tiny:cloud", ["user"], HI, [{"role": "user", "content": [{"type": "text"}]}]]),
    st.lists(st.integers(-1, 300) | st.lists(st.integers(0, 256), max_size=3), max_size=4),
)


def test_null_means_absent_and_unknown_fields_are_ignored() -> None:
    nothing: dict[str, Any] = dict.fromkeys(FIELDS + list(schema.NEUTRAL_VALUES))
    del nothing["model"], nothing["messages"]
    job = chat(**nothing, user="u", metadata={"a": "b"}, store=True, service_tier="flex", sparkle={"deep": [1]})
    assert job.requests[0].top_logprobs is None


def test_neutral_values_of_unsupported_fields_are_accepted() -> None:
    chat(tools=[], tool_choice="none", response_format={"type": "text"}, modalities=["text"])
    chat(logit_bias={}, frequency_penalty=0.0, presence_penalty=0)
    completion(suffix="", best_of=1)


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_unsupported_values_are_refused_by_field(name: str, value: Any) -> None:
    with pytest.raises(ApiError) as caught:
        chat(**{name: value})
    error = caught.value.error
    assert caught.value.status == 400
    assert error["type"] == "invalid_request_error"
    assert error["param"] == name
    assert name in str(error["message"])
    assert "\n" not in str(error["message"])


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "function", "content": "x"}, "messages[0].role"),
        ({"role": "tool"}, "messages[0].content"),
        ({"role": 3, "content": "x"}, "messages[0].role"),
        ({"role": [], "content": "x"}, "messages[0].role"),
        ({"role": "user"}, "messages[0].content"),
        ({"role": "user", "content": None}, "messages[0].content"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, "messages[0].content"),
        ({"role": "user", "content": [{"type": "text", "text": 3}]}, "messages[0].content"),
        ({"role": "user", "content": ["x"]}, "messages[0].content"),
        ({"role": "assistant", "content": "x", "tool_calls": [{}]}, "messages[0].tool_calls[0].id"),
        ({"role": "assistant", "tool_calls": [CALL] * 129}, "messages[0].tool_calls"),
        ({"role": "assistant", "tool_calls": [{**CALL, "id": "x" * 257}]}, "messages[0].tool_calls[0].id"),
        (
            {"role": "assistant", "tool_calls": [{**CALL, "function": {"name": "f", "arguments": "[]"}}]},
            "messages[0].tool_calls[0].function.arguments",
        ),
        ("hi", "messages[0]"),
    ],
)
def test_unsupported_messages_are_refused(message: object, param: str) -> None:
    with pytest.raises(ApiError) as caught:
        chat(messages=[message])
    assert caught.value.error["param"] == param


@pytest.mark.parametrize("prompt", [[], [[]], "", [""], [1.5], [True], ["a", 1], [[1], "a"], {}, 3, None])
def test_values_that_are_no_prompt_are_refused(prompt: object) -> None:
    with pytest.raises(ApiError) as caught:
        completion(prompt=prompt)
    assert (caught.value.status, caught.value.error["param"]) == (400, "prompt")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"best_of": 2}, "best_of"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"tools": [{}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"prediction": {"type": "content", "content": "x"}}, "prediction"),
        ({"logprobs": 6}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"prompt": ["a"] * 100, "n": 2}, "prompt"),
    ],
)
def test_unsupported_completions_are_refused_by_field(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as caught:
        completion(**fields)
    assert caught.value.error["param"] == param


@pytest.mark.parametrize("quality", [-0.1, 1.1, "0.8", True, []])
def test_an_invalid_quality_is_refused_by_name(quality: object) -> None:
    with pytest.raises(ApiError) as caught:
        chat(quality=quality)
    assert (caught.value.status, caught.value.error["param"]) == (400, "quality")


@pytest.mark.parametrize("body", BROKEN, ids=range(len(BROKEN)))
@pytest.mark.parametrize("parse", [chat_job, completion_job])
def test_broken_bodies_are_refused_in_one_line(parse: JobParser, body: bytes) -> None:
    with pytest.raises(ApiError) as caught:
        parse(body, False, BACKEND)
    assert caught.value.status == 400
    assert "\n" not in str(caught.value)


@settings(max_examples=300)
@given(
    st.dictionaries(NAMES, NEARLY, max_size=8),
    st.sampled_from([{}, {"model": "auto", "messages": HI, "prompt": "hi"}]),
    st.sampled_from([chat_job, completion_job]),
)
def test_any_json_is_a_job_or_an_api_error(fields: dict[str, Any], good: dict[str, Any], parse: JobParser) -> None:
    try:
        job = parse(json.dumps({**good, **fields}).encode(), False, BACKEND)
        refused = (400, len(job.requests) == len(job.echoed_prompts))
    except ApiError as error:
        json.dumps(error.error).encode()
        refused = (error.status, list(error.error) == ["message", "type", "param", "code"])
    assert refused in ((400, True), (404, True))


@given(st.binary(max_size=40))
def test_any_bytes_are_refused(body: bytes) -> None:
    with pytest.raises(ApiError):
        chat_job(body, False, BACKEND)
