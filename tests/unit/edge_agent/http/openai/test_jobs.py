from __future__ import annotations

from typing import Any

import pytest

from isthmus.edge_agent.http.openai.errors import ApiError
from isthmus.models.language.checkpoint import tokenizer
from isthmus.models.messages import MAX_SEED, Sampling
from tests.unit.edge_agent.http.openai.bodies import BACKEND, HI, chat, completion
from tests.unit.edge_agent.language.scripted import ScriptedBackend


def test_defaults_of_a_chat() -> None:
    job = chat()
    (request,) = job.requests
    assert bytes(request.prompt) == b"[user]hi[assistant]"
    assert request.max_tokens == BACKEND.context - len(request.prompt)
    assert (request.arm, request.sampling.temperature, request.sampling.top_p, request.top_logprobs) == (
        "auto",
        1.0,
        1.0,
        None,
    )
    assert (job.model, job.stops, job.stream, job.include_usage) == ("tiny:auto", (), False, False)


def test_defaults_of_a_completion() -> None:
    (request,) = completion().requests
    assert (bytes(request.prompt), request.max_tokens) == (b"hi", 16)


def test_without_a_seed_every_request_has_its_own() -> None:
    assert chat().requests[0].sampling.seed != chat().requests[0].sampling.seed


def test_supported_fields_reach_the_requests() -> None:
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
    assert [request.sampling.seed for request in job.requests] == [11, 12, 13]
    assert {
        (request.max_tokens, request.arm, request.sampling.top_p, request.top_logprobs) for request in job.requests
    } == {(7, "cloud", 0.5, 2)}
    assert (job.stops, job.stream, job.include_usage, job.n) == (("x",), True, True, 3)


def test_roles_and_parts() -> None:
    job = chat(
        messages=[
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "name": "Ann", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "assistant", "content": ""},
        ]
    )
    assert bytes(job.requests[0].prompt) == b"[system]Be brief.[user]a\nb[assistant][assistant]"


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
    assert [bytes(request.prompt) for request in job.requests] == [text for text in expected for _ in range(2)]
    assert job.echoed_prompts == tuple(text.decode() for text in expected for _ in range(2))


@pytest.mark.parametrize("id", [-1, 257, 10**4000])
def test_a_token_id_out_of_range_is_named(id: int) -> None:
    with pytest.raises(ApiError, match=f"{str(id)[:20]}, expected 0 to 256"):
        completion(prompt=[5, id])


def test_a_prompt_must_leave_room_to_answer() -> None:
    assert completion(prompt="x" * 199, max_tokens=50).requests[0].max_tokens == 1
    for job, fields in ((completion, {"prompt": "x" * 200}), (chat, {"messages": [{**HI[0], "content": "x" * 200}]})):
        with pytest.raises(ApiError) as caught:
            job(**fields)
        assert caught.value.error["code"] == "context_length_exceeded"


@pytest.mark.parametrize("job", [chat, completion])
def test_a_prompt_with_more_bytes_than_the_context_can_have_is_refused_before_it_is_encoded(
    job: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The longest token, <|im_end|>, has 10 bytes, so 200 tokens have at most 2,000."""

    def count(*arguments: Any, **settings: Any) -> list[int]:
        encoded.append(arguments)
        return [65]

    backend, encoded = ScriptedBackend(), list[Any]()
    monkeypatch.setattr(tokenizer, "_ids", count)
    for size, fits in ((1900, True), (2100, False), (4_000_000, False)):
        fields = {"prompt": "7" * size} if job is completion else {"messages": [{**HI[0], "content": "7" * size}]}
        if fits:
            assert job(backend=backend, **fields)
            continue
        with pytest.raises(ApiError, match="bytes, more than any 200 tokens have") as caught:
            job(backend=backend, **fields)
        assert (caught.value.status, caught.value.error["code"]) == (400, "context_length_exceeded")
        assert caught.value.error["param"] in ("prompt", "messages")
    assert len(encoded) == 1


@pytest.mark.parametrize(("model", "fits"), [("edge", False), ("auto", True), ("cloud", True), ("verify", True)])
def test_each_arm_has_its_own_context(model: str, fits: bool) -> None:
    backend = ScriptedBackend(device_context=50)
    for job, fields in ((completion, {"prompt": "x" * 60}), (chat, {"messages": [{**HI[0], "content": "x" * 60}]})):
        if fits:
            assert job(backend=backend, model=model, **fields)
        else:
            with pytest.raises(ApiError, match="this model's maximum context length is 50 tokens") as caught:
                job(backend=backend, model=model, **fields)
            assert caught.value.error["code"] == "context_length_exceeded"


def test_sampling_is_the_models_own_where_the_request_states_none() -> None:
    backend = ScriptedBackend(sampling=Sampling(0.2, 0.9))
    for job in (chat, completion):
        stated: list[dict[str, Any]] = [{}, {"temperature": 0.7}, {"top_p": 0.5}, {"temperature": 0, "top_p": 1}]
        found = [job(backend=backend, **fields).requests[0].sampling for fields in stated]
        assert [(each.temperature, each.top_p) for each in found] == [(0.2, 0.9), (0.7, 0.9), (0.2, 0.5), (0.0, 1.0)]


def test_an_assistant_may_have_said_nothing() -> None:
    said = {"role": "assistant", "content": None, "tool_calls": [], "refusal": None}
    for message in (said, {"role": "assistant"}):
        job = chat(messages=[HI[0], message, HI[0]])
        assert bytes(job.requests[0].prompt) == b"[user]hi[assistant][user]hi[assistant]"
    for role in ("user", "system"):
        for message in ({"role": role, "content": None}, {"role": role}):
            with pytest.raises(ApiError, match=r"messages\[0\].content: expected a string or a list") as caught:
                chat(messages=[message])
            assert caught.value.error["param"] == "messages[0].content"


def test_seeds_of_either_sign() -> None:
    assert chat(seed=-1).requests[0].sampling.seed == MAX_SEED
    assert [request.sampling.seed for request in chat(seed=MAX_SEED, n=2).requests] == [MAX_SEED, 0]


def test_top_p_zero_is_the_likeliest_token() -> None:
    assert 0 < chat(top_p=0).requests[0].sampling.top_p < 1e-6
