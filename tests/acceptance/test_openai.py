"""The service before a server of another kind that speaks text: `transformers serve`, dialect openai."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from isthmus.models.language.checkpoint.checkpoint import Checkpoint
from isthmus.models.language.checkpoint.tokenizer import Message
from tests.acceptance.engine_parts import PROMPTS, chat, check
from tests.bench.engine_process import EngineProcess, wait_described
from tests.bench.processes import CloudProcess, free_port

MODEL = "acceptance/smollm2"


@pytest.fixture(scope="module")
def engine(smollm2: Path) -> Iterator[EngineProcess]:
    with EngineProcess(f"tests/acceptance/transformers.sh {smollm2} {{port}}", free_port()) as process:
        yield process


@pytest.fixture(scope="module")
def cloud(engine: EngineProcess, smollm2: Path) -> Iterator[CloudProcess]:
    named = ("--engine-dialect", "openai", "--engine-model", MODEL, "--engine-context", "2048")
    arguments = ("--engine-url", engine.url, "--engine-tokenizer", str(smollm2), *named)
    with CloudProcess(arguments=arguments) as process:
        wait_described(process.target)
        yield process


def test_it_serves_the_arm_cloud_alone(cloud: CloudProcess) -> None:
    assert check(cloud) == (0, f"SERVING\nengine: {MODEL}, context 2048, cloud\n")


@pytest.mark.parametrize("question", PROMPTS[:3])
def test_an_answer_is_the_text_that_the_server_gives_by_itself(
    engine: EngineProcess, cloud: CloudProcess, smollm2: Path, question: str
) -> None:
    tokenizer = Checkpoint.open(smollm2).tokenizer
    prompt = tokenizer.written(tokenizer.chat([Message("user", question)])).decode()
    body = {"model": MODEL, "prompt": prompt, "max_tokens": 16, "temperature": 0, "top_p": 1.0}
    text = httpx.post(f"{engine.url}/v1/completions", json=body, timeout=120, trust_env=False).json()
    status, answer, _ = chat(cloud, "--arm", "cloud", "--max-tokens", "16", question=question)
    assert status == 0
    assert (answer["arm"], answer["degraded"]) == ("cloud", False)
    assert answer["text"] == text["choices"][0]["text"]


def test_verify_is_refused_in_a_line(cloud: CloudProcess) -> None:
    status, answer, stderr = chat(cloud, "--arm", "verify", "--draft", "lookup")
    said = answer.get("error") or stderr
    print(said)
    assert status != 0
    assert "verify" in said
    assert len(said.splitlines()) == 1
