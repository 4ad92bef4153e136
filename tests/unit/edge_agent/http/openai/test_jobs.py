from __future__ import annotations

import pytest

from isthmus.edge_agent.http.openai.errors import ApiError
from isthmus.models.messages import MAX_SEED
from tests.unit.edge_agent.http.openai.bodies import BACKEND, HI, chat, completion


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


def test_seeds_of_either_sign() -> None:
    assert chat(seed=-1).requests[0].sampling.seed == MAX_SEED
    assert [request.sampling.seed for request in chat(seed=MAX_SEED, n=2).requests] == [MAX_SEED, 0]


def test_top_p_zero_is_the_likeliest_token() -> None:
    assert 0 < chat(top_p=0).requests[0].sampling.top_p < 1e-6
