from __future__ import annotations

import json
from typing import Any

import pytest

from isthmus.edge_agent.http.openai.chat_jobs import chat_job
from isthmus.edge_agent.http.openai.errors import ApiError
from isthmus.edge_agent.http.openai.model_names import available_models
from tests.unit.edge_agent.http.openai.bodies import BACKEND, HI, chat, completion
from tests.unit.edge_agent.language.scripted import ScriptedBackend


def test_model_names() -> None:
    assert available_models(BACKEND) == {
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
    assert set(available_models(ScriptedBackend(cloud=False)).values()) == {"auto", "edge"}


def test_an_alias_is_a_name_as_any_other() -> None:
    backend = ScriptedBackend(aliases=("small",))
    assert {"small": "auto", "small:edge": "edge", "tiny": "auto"}.items() <= available_models(backend).items()
    assert [chat(backend=backend, model=name).model for name in ("small", "small:edge")] == ["tiny:auto", "tiny:edge"]
    assert chat(True, backend, model="small:handoff").arm == "edge"


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
def test_quality_is_part_of_the_models_name_or_a_field(fields: dict[str, Any], quality: float | None) -> None:
    job = chat(**fields)
    assert (job.arm, job.model) == ("auto", "tiny:auto")
    assert [request.quality for request in job.requests] == [quality]
    assert completion(**fields).requests[0].quality == quality


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
def test_an_unknown_model_is_a_404(name: str) -> None:
    with pytest.raises(ApiError) as caught:
        chat(backend=ScriptedBackend(cloud=False), model=name)
    assert (caught.value.status, caught.value.error["code"]) == (404, "model_not_found")


@pytest.mark.parametrize("name", ["auto", "edge", "tiny", "tiny:edge", "tiny:auto", "auto-q0.9"])
def test_a_private_request_stays_on_the_device(name: str) -> None:
    assert chat(header=True, model=name).arm == "edge"
    assert completion(True, model=name).requests[0].arm == "edge"
    body = {"model": name, "messages": HI, "private": True}
    assert chat_job(json.dumps(body).encode(), False, BACKEND).arm == "edge"


@pytest.mark.parametrize("name", ["cloud", "verify", "handoff", "tiny:cloud", "tiny:verify", "tiny:handoff"])
@pytest.mark.parametrize("cloud", [True, False])
def test_a_private_request_that_names_an_arm_of_the_cloud_is_answered_by_edge(name: str, cloud: bool) -> None:
    job = chat(True, ScriptedBackend(cloud=cloud), model=name)
    assert (job.arm, job.requests[0].arm, job.model) == ("edge", "edge", "tiny:edge")


@pytest.mark.parametrize("name", ["gpt-4", "cloud-q0.9", "tiny:cloudy"])
def test_a_private_request_for_an_unknown_model_is_a_404_as_any_other(name: str) -> None:
    with pytest.raises(ApiError) as caught:
        chat(True, model=name)
    assert caught.value.status == 404
