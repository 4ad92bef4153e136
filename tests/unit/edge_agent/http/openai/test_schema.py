from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.edge_agent.http.openai import schema as openai_schema
from isthmus.edge_agent.http.openai.schema import ApiError, Check, Job, chat_job, completion_job, models
from isthmus.models.messages import MAX_SEED
from tests.unit.edge_agent.language.scripted import Scripted

GENERATOR = Scripted()
HI = [{"role": "user", "content": "hi"}]
WRONG: dict[str, list[Any]] = {
    "tools": [[{"type": "function"}]],
    "functions": [[{}]],
    "tool_choice": ["required"],
    "response_format": [{"type": "json_object"}],
    "logit_bias": [{"50256": -100}],
    "frequency_penalty": [0.1],
    "presence_penalty": [-1],
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
FIELDS = sorted(openai_schema.ChatRequest.model_fields | openai_schema.CompletionRequest.model_fields)
NAMES = st.sampled_from([*FIELDS, *openai_schema.ASKS_NOTHING, "else"])
NEARLY = st.one_of(
    JSON,
    st.sampled_from(["auto", "edge", "tiny:cloud", ["user"], HI, [{"role": "user", "content": [{"type": "text"}]}]]),
    st.lists(st.integers(-1, 300) | st.lists(st.integers(0, 256), max_size=3), max_size=4),
)


def chat(header: bool = False, generator: Scripted = GENERATOR, **fields: Any) -> Job:
    body = {"model": "auto", "messages": HI, **fields}
    return chat_job(json.dumps(body).encode(), header, generator)


def completion(header: bool = False, generator: Scripted = GENERATOR, **fields: Any) -> Job:
    body = {"model": "auto", "prompt": "hi", **fields}
    return completion_job(json.dumps(body).encode(), header, generator)


def test_defaults_of_a_chat() -> None:
    job = chat()
    (ask,) = job.asks
    assert bytes(ask.prompt) == b"[user]hi[assistant]"
    assert ask.max_tokens == GENERATOR.context - len(ask.prompt)
    assert (ask.arm, ask.sampling.temperature, ask.sampling.top_p, ask.top_logprobs) == ("auto", 1.0, 1.0, None)
    assert (job.model, job.stops, job.stream, job.include_usage) == ("tiny:auto", (), False, False)


def test_defaults_of_a_completion() -> None:
    (ask,) = completion().asks
    assert (bytes(ask.prompt), ask.max_tokens) == (b"hi", 16)


def test_without_a_seed_every_request_has_another() -> None:
    assert chat().asks[0].sampling.seed != chat().asks[0].sampling.seed


def test_all_that_is_honoured_arrives() -> None:
    job = chat(
        model="tiny:cloud",
        max_tokens=9,
        max_completion_tokens=7,
        temperature=0,
        top_p=0.5,
        seed=11,
        n=3,
        stop="x",
        stream=True,
        stream_options={"include_usage": True},
        logprobs=True,
        top_logprobs=2,
    )
    assert [ask.sampling.seed for ask in job.asks] == [11, 12, 13]
    assert {(ask.max_tokens, ask.arm, ask.sampling.top_p, ask.top_logprobs) for ask in job.asks} == {
        (7, "cloud", 0.5, 2)
    }
    assert (job.stops, job.stream, job.include_usage, job.n) == (("x",), True, True, 3)


def test_null_means_absent_and_the_unknown_is_ignored() -> None:
    nothing: dict[str, Any] = dict.fromkeys(FIELDS + list(openai_schema.ASKS_NOTHING))
    del nothing["model"], nothing["messages"]
    job = chat(**nothing, user="u", metadata={"a": "b"}, store=True, service_tier="flex", sparkle={"deep": [1]})
    assert job.asks[0].top_logprobs is None


def test_values_that_ask_for_nothing_are_accepted() -> None:
    chat(tools=[], tool_choice="none", response_format={"type": "text"}, modalities=["text"])
    chat(logit_bias={}, frequency_penalty=0.0, presence_penalty=0)
    completion(suffix="", best_of=1)


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_a_chat_that_cannot_be_honoured_is_refused_by_field(name: str, value: Any) -> None:
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
        ({"role": "tool", "content": "x"}, "messages[0].role"),
        ({"role": 3, "content": "x"}, "messages[0].role"),
        ({"role": [], "content": "x"}, "messages[0].role"),
        ({"role": "user"}, "messages[0].content"),
        ({"role": "user", "content": None}, "messages[0].content"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, "messages[0].content"),
        ({"role": "user", "content": [{"type": "text", "text": 3}]}, "messages[0].content"),
        ({"role": "user", "content": ["x"]}, "messages[0].content"),
        ({"role": "assistant", "content": "x", "tool_calls": [{}]}, "messages[0].tool_calls"),
        ("hi", "messages[0]"),
    ],
)
def test_messages_we_cannot_read(message: object, param: str) -> None:
    with pytest.raises(ApiError) as caught:
        chat(messages=[message])
    assert caught.value.error["param"] == param


def test_roles_and_parts() -> None:
    job = chat(
        messages=[
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "name": "Ann", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "assistant", "content": ""},
        ]
    )
    assert bytes(job.asks[0].prompt) == b"[system]Be brief.[user]a\nb[assistant][assistant]"


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("hi", [b"hi"]),
        (["a", "b"], [b"a", b"b"]),
        ([104, 105], [b"hi"]),
        ([[104], [105, 106]], [b"h", b"ij"]),
    ],
)
def test_forms_of_a_prompt(prompt: object, expected: list[bytes]) -> None:
    job = completion(prompt=prompt, n=2, echo=True)
    assert [bytes(ask.prompt) for ask in job.asks] == [text for text in expected for _ in range(2)]
    assert job.echoes == tuple(text.decode() for text in expected for _ in range(2))


@pytest.mark.parametrize("prompt", [[], [[]], "", [""], [1.5], [True], ["a", 1], [[1], "a"], {}, 3, None])
def test_prompts_that_are_none(prompt: object) -> None:
    with pytest.raises(ApiError) as caught:
        completion(prompt=prompt)
    assert (caught.value.status, caught.value.error["param"]) == (400, "prompt")


@pytest.mark.parametrize("id", [-1, 257, 10**4000])
def test_a_token_id_out_of_range_is_named(id: int) -> None:
    with pytest.raises(ApiError, match=f"{str(id)[:20]}, expected 0 to 256"):
        completion(prompt=[5, id])


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"best_of": 2}, "best_of"),
        ({"echo": True, "logprobs": 0}, "echo"),
        ({"logprobs": 6}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"prompt": ["a"] * 100, "n": 2}, "prompt"),
    ],
)
def test_completions_that_cannot_be_honoured(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as caught:
        completion(**fields)
    assert caught.value.error["param"] == param


def test_a_prompt_must_leave_room_to_answer() -> None:
    assert completion(prompt="x" * 199, max_tokens=50).asks[0].max_tokens == 1
    for job, fields in ((completion, {"prompt": "x" * 200}), (chat, {"messages": [{**HI[0], "content": "x" * 200}]})):
        with pytest.raises(ApiError) as caught:
            job(**fields)
        assert caught.value.error["code"] == "context_length_exceeded"


def test_seeds_of_either_sign() -> None:
    assert chat(seed=-1).asks[0].sampling.seed == MAX_SEED
    assert [ask.sampling.seed for ask in chat(seed=MAX_SEED, n=2).asks] == [MAX_SEED, 0]


def test_top_p_zero_is_the_likeliest_token() -> None:
    assert 0 < chat(top_p=0).asks[0].sampling.top_p < 1e-6


def test_model_names() -> None:
    assert models(GENERATOR) == {
        "tiny": "auto",
        "auto": "auto",
        "edge": "edge",
        "cloud": "cloud",
        "verify": "verify",
        "tiny:auto": "auto",
        "tiny:edge": "edge",
        "tiny:cloud": "cloud",
        "tiny:verify": "verify",
    }
    assert set(models(Scripted(cloud=False)).values()) == {"auto", "edge"}


@pytest.mark.parametrize(
    ("fields", "quality"),
    [
        ({"model": "auto"}, None),
        ({"model": "auto-q0.8"}, 0.8),
        ({"model": "tiny-q1"}, 1.0),
        ({"model": "tiny:auto-q0"}, 0.0),
        ({"model": "auto", "quality": 0.25}, 0.25),
        ({"model": "auto-q0.8", "quality": 0.25}, 0.8),
    ],
)
def test_the_dial_is_a_part_of_the_models_name_or_a_field(fields: dict[str, Any], quality: float | None) -> None:
    job = chat(**fields)
    assert (job.arm, job.model) == ("auto", "tiny:auto")
    assert [ask.quality for ask in job.asks] == [quality]
    assert completion(**fields).asks[0].quality == quality


@pytest.mark.parametrize("quality", [-0.1, 1.1, "0.8", True, []])
def test_a_quality_that_is_none_is_refused_by_name(quality: object) -> None:
    with pytest.raises(ApiError) as caught:
        chat(quality=quality)
    assert (caught.value.status, caught.value.error["param"]) == (400, "quality")


@pytest.mark.parametrize(
    "name",
    [
        "gpt-4",
        "tiny:",
        "tiny:tiny",
        "cloud",
        "tiny:verify",
        "",
        "edge-q0.5",
        "auto-q",
        "auto-q1.5",
        "auto-q-1",
        "auto-qx",
    ],
)
def test_what_is_not_there_is_a_404(name: str) -> None:
    with pytest.raises(ApiError) as caught:
        chat(generator=Scripted(cloud=False), model=name)
    assert (caught.value.status, caught.value.error["code"]) == (404, "model_not_found")


@pytest.mark.parametrize("name", ["auto", "edge", "tiny", "tiny:edge", "tiny:auto", "auto-q0.9"])
def test_what_is_private_stays_on_the_device(name: str) -> None:
    assert chat(header=True, model=name).arm == "edge"
    assert completion(True, model=name).asks[0].arm == "edge"
    body = {"model": name, "messages": HI, "private": True}
    assert chat_job(json.dumps(body).encode(), False, GENERATOR).arm == "edge"


@pytest.mark.parametrize("name", ["cloud", "verify", "tiny:cloud", "tiny:verify"])
@pytest.mark.parametrize("cloud", [True, False])
def test_what_is_private_cannot_ask_for_the_cloud(name: str, cloud: bool) -> None:
    with pytest.raises(ApiError) as caught:
        chat(True, Scripted(cloud=cloud), model=name)
    assert (caught.value.status, caught.value.error["param"]) == (400, "model")


@pytest.mark.parametrize("body", BROKEN, ids=range(len(BROKEN)))
@pytest.mark.parametrize("check", [chat_job, completion_job])
def test_broken_bodies_are_refused_in_one_line(check: Check, body: bytes) -> None:
    with pytest.raises(ApiError) as caught:
        check(body, False, GENERATOR)
    assert caught.value.status == 400
    assert "\n" not in str(caught.value)


@settings(max_examples=300)
@given(
    st.dictionaries(NAMES, NEARLY, max_size=8),
    st.sampled_from([{}, {"model": "auto", "messages": HI, "prompt": "hi"}]),
    st.sampled_from([chat_job, completion_job]),
)
def test_any_json_is_a_job_or_an_api_error(fields: dict[str, Any], good: dict[str, Any], check: Check) -> None:
    try:
        job = check(json.dumps({**good, **fields}).encode(), False, GENERATOR)
        told = (400, len(job.asks) == len(job.echoes))
    except ApiError as error:
        json.dumps(error.error).encode()
        told = (error.status, list(error.error) == ["message", "type", "param", "code"])
    assert told in ((400, True), (404, True))


@given(st.binary(max_size=40))
def test_any_bytes_are_refused(body: bytes) -> None:
    with pytest.raises(ApiError):
        chat_job(body, False, GENERATOR)
