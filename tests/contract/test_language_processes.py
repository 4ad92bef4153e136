"""The agent and the cloud as processes: OpenAI's own client over HTTP, and a chat over standard input."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.bench.processes import ROOT, CloudProcess, EdgeProcess
from tests.contract.conftest import LANGUAGE

HI: Any = [{"role": "user", "content": "Hello there."}]
JSON = {"content-type": "application/json"}
SLOWDOWN = 8  # a forward pass takes about 8 ms, so that a client can disconnect in mid-answer
CANCELLED_S = 2.0  # after a client disconnects, the cloud computes for it no longer than this


@pytest.fixture(scope="module")
def cloud(endless_llama: Path) -> Iterator[CloudProcess]:
    arguments = ("--model", str(endless_llama), *LANGUAGE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ISTHMUS_BENCH_SLOWDOWN", str(SLOWDOWN))
        with CloudProcess(arguments=arguments, module="tests.bench.slow_cloud") as process:
            yield process


@pytest.fixture(scope="module")
def edge(cloud: CloudProcess, endless_llama: Path) -> Iterator[EdgeProcess]:
    with EdgeProcess("--model", str(endless_llama), "--cloud", cloud.target, "--threads", "1") as process:
        yield process


@pytest.fixture
def client(edge: EdgeProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{edge.url}/v1", api_key="none", max_retries=0, timeout=30) as client:
        yield client


def isthmus(response: Any) -> dict[str, Any]:
    return dict(response.model_extra["isthmus"])


def test_the_arms_give_the_same_text(client: openai.OpenAI, cloud: CloudProcess) -> None:
    before = cloud.metric("tokens_committed_total")
    texts = {}
    for name, arm in (("endless", "auto"), ("endless:cloud", "cloud"), ("verify", "verify")):
        response = client.chat.completions.create(model=name, messages=HI, max_tokens=20, temperature=0.8, seed=3)
        texts[name] = response.choices[0].message.content
        assert response.choices[0].finish_reason == "length"
        assert response.usage is not None and response.usage.completion_tokens == 20
        assert isthmus(response)["arm"] == arm and not isthmus(response)["degraded"]
    assert len(set(texts.values())) == 1 and texts["endless"]
    assert cloud.metric("tokens_committed_total") - before >= 60


def test_chunks_of_a_stream_add_up_to_the_response(client: openai.OpenAI) -> None:
    request: dict[str, Any] = {"model": "auto", "messages": HI, "max_tokens": 30, "temperature": 0.8, "seed": 5}
    response = client.chat.completions.create(**request)
    chunks = list(client.chat.completions.create(**request, stream=True, stream_options={"include_usage": True}))
    pieces = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices and chunk.choices[0].delta.content]
    assert len(pieces) > 5 and "".join(pieces) == response.choices[0].message.content
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 30
    assert isthmus(chunks[-1])["arm"] == "auto" and isthmus(chunks[-1])["spans"][0]["arm"] in ("cloud", "verify")


def test_a_completion_with_logprobs(client: openai.OpenAI) -> None:
    response = client.completions.create(model="cloud", prompt="The bridge", max_tokens=8, logprobs=2, temperature=0)
    logprobs = response.choices[0].logprobs
    assert logprobs is not None and logprobs.token_logprobs is not None and len(logprobs.token_logprobs) == 8
    assert all(value is not None and value <= 0 for value in logprobs.token_logprobs)


def test_models(client: openai.OpenAI) -> None:
    names = [model.id for model in client.models.list()]
    assert names[0] == "endless" and {"auto", "edge", "cloud", "verify", "endless:cloud"} <= set(names)
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.chat.completions.create(model="gpt-4", messages=HI)


@pytest.mark.parametrize("stream", [False, True], ids=["response", "stream"])
@pytest.mark.parametrize("model", ["auto", "cloud", "verify"])
def test_a_private_request_stays_on_the_device(
    client: openai.OpenAI, cloud: CloudProcess, stream: bool, model: str
) -> None:
    before = [cloud.metric(name) for name in ("tokens_committed_total", "decoder_rows_total")]
    request: Any = {"model": model, "messages": HI, "max_tokens": 40, "seed": 3, "extra_body": {"private": True}}
    if stream:
        chunks = list(client.chat.completions.create(**request, stream=True))
        assert sum(bool(chunk.choices[0].delta.content) for chunk in chunks if chunk.choices) > 5
        field = isthmus(chunks[-1])
    else:
        response = client.chat.completions.create(**request)
        assert response.choices[0].message.content
        field = isthmus(response)
    assert field["arm"] == "edge" and field["bytes_up"] == field["bytes_down"] == 0
    assert [cloud.metric(name) for name in ("tokens_committed_total", "decoder_rows_total")] == before


@pytest.mark.parametrize("arm", ["cloud", "verify"])
def test_a_client_that_disconnects_ends_the_work_in_the_cloud(
    client: openai.OpenAI, cloud: CloudProcess, arm: str
) -> None:
    max_tokens = 400
    before = cloud.metric("tokens_committed_total")
    stream = client.chat.completions.create(
        model=arm, messages=HI, max_tokens=max_tokens, temperature=0.8, seed=5, stream=True
    )
    for _, chunk in zip(range(5), stream, strict=False):
        assert chunk.choices
    stream.close()
    time.sleep(CANCELLED_S)
    rows, committed = cloud.metric("decoder_rows_total", kind="used"), cloud.metric("tokens_committed_total") - before
    time.sleep(0.5)
    assert cloud.metric("decoder_rows_total", kind="used") == rows
    assert 0 < committed < max_tokens - 50, "the client was to disconnect in mid-answer"


def test_health_and_metrics(edge: EdgeProcess, client: openai.OpenAI) -> None:
    client.chat.completions.create(model="edge", messages=HI, max_tokens=3, temperature=0)
    assert httpx.get(f"{edge.url}/healthz").json() == {"status": "ok"}
    page = httpx.get(f"{edge.url}/metrics")
    assert page.status_code == 200
    values = dict(line.rsplit(" ", 1) for line in page.text.splitlines() if not line.startswith("#"))
    assert float(values['isthmus_edge_tokens_total{source="edge"}']) >= 3


def test_malformed_bodies_are_refused(edge: EdgeProcess) -> None:
    """Each gets status 400 and an error of one line; the next request is answered."""
    good = b'{"model": "edge", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}'
    for body in (
        b"\xff\xfe{",
        good.replace(b"hi", b"\xc3\x28"),
        b"",
        b"[]",
        b"{" * 10_000,
        good.replace(b"2", b"1e999"),
    ):
        response = httpx.post(f"{edge.url}/v1/chat/completions", content=body, headers=JSON)
        assert response.status_code == 400, body[:40]
        message = response.json()["error"]["message"]
        assert message and "\n" not in message and "Traceback" not in message
    assert httpx.post(f"{edge.url}/v1/chat/completions", content=good, headers=JSON).status_code == 200
    assert "Traceback" not in edge.read_log()


def chat(model: Path, lines: str, *arguments: str) -> list[dict[str, Any]]:
    command = [
        sys.executable,
        "-m",
        "isthmus.edge_agent",
        "chat",
        "--model",
        str(model),
        "--json",
        "--threads",
        "1",
        *arguments,
    ]
    result = subprocess.run(command, cwd=ROOT, input=lines, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr[-2000:]
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_chat_over_standard_input(endless_llama: Path, cloud: CloudProcess) -> None:
    """Three questions in one chat, each by another arm."""
    lines = "How are you?\n\n/arm cloud\nAnd why?\n/arm edge\nReally?\n"
    first, second, third = chat(endless_llama, lines, "--cloud", cloud.target, "--max-tokens", "12")
    assert [row["question"] for row in (first, second, third)] == ["How are you?", "And why?", "Really?"]
    assert [row["arm"] for row in (first, second, third)] == ["auto", "cloud", "edge"]
    for row in (first, second, third):
        assert row["tokens"] == sum(row["made"].values()) == 12 and row["text"] and not row["degraded"]
    assert third["made"]["edge"] == 12 and third["bytes_up"] == 0 < second["bytes_up"]


def test_chat_without_a_cloud(endless_llama: Path) -> None:
    (row,) = chat(endless_llama, "Hello\n/quit\nnever asked\n", "--max-tokens", "6")
    assert row["arm"] == "edge" and row["tokens"] == 6
