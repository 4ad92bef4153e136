"""Programs and libraries that know OpenAI's or Ollama's API, against an agent: the student here, SmolLM2 in the cloud.

Each is a process of its own environment (clients/install.sh), which prints what it got as one JSON object.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.acceptance.conftest import HERE, ROOT
from tests.bench.processes import CloudProcess, EdgeProcess

CLIENTS = HERE / "clients"
ENVIRONMENT = ROOT / "build" / "clients"
MODELS = ("edge", "auto", "cloud")  # auto: the student with SmolLM2 where it doubts
CITY = {"capital": bool, "population": int}
NOTED_CITY = {**CITY, "note": str}
CLIENT_S = 300.0

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def installed() -> None:
    subprocess.run([CLIENTS / "install.sh"], check=True, timeout=800)


@pytest.fixture(scope="module")
def url(installed: None) -> Iterator[str]:
    with (
        CloudProcess(arguments=("--model", "smollm2", "--threads", "1")) as cloud,
        EdgeProcess("--model", "student", "--cloud", cloud.target) as edge,
    ):
        yield edge.url


def found_by(name: str, url: str, model: str) -> dict[str, Any]:
    """What a client prints."""
    python = str(ENVIRONMENT / "bin" / "python")
    command = [python, str(CLIENTS / f"{name}_client.py"), url, model]
    if name == "ai":
        shutil.copy(CLIENTS / "ai_client.mjs", ENVIRONMENT)  # beside what it imports
        command = ["node", str(ENVIRONMENT / "ai_client.mjs"), url, model]
    done = run(command)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    print(name, model, json.dumps(found, ensure_ascii=False))
    assert isinstance(found, dict)
    return found


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    return subprocess.run(command, capture_output=True, text=True, timeout=CLIENT_S, env=environment, check=False)


def types(found: dict[str, Any]) -> dict[str, type]:
    return {key: type(value) for key, value in found.items()}


@pytest.mark.parametrize("model", MODELS)
def test_openai(url: str, model: str) -> None:
    found = found_by("openai", url, model)
    assert (found["whole"]["finish"], found["whole"]["name"]) == ("tool_calls", "get_weather")
    arguments = found["whole"]["arguments"]
    assert list(arguments) == ["city"] and isinstance(arguments["city"], str)
    assert found["streamed"] == {"name": "get_weather", "arguments": arguments}
    assert found["async"] == arguments
    assert found["whole"]["answer"]
    assert types(found["parsed"]) == CITY
    assert found["responses"]["text"]
    kind, name, called = found["responses"]["call"]
    assert (kind, name, list(called)) == ("function_call", "get_weather", ["city"])
    assert found["responses"]["parsed"] == found["parsed"] == json.loads(found["responses"]["streamed"])
    assert found["responses"]["events"] == ["response.created", "response.completed"]


@pytest.mark.parametrize("model", MODELS)
def test_langchain(url: str, model: str) -> None:
    found = found_by("langchain", url, model)
    name, arguments = found["call"]
    assert name == "get_weather" and isinstance(arguments["city"], str)
    assert found["streamed"] == found["call"]
    assert found["answer"]
    for method in ("json_schema", "function_calling"):
        assert types(found[method]) == NOTED_CITY
        assert found[f"{method}_streamed"] == found[method]


@pytest.mark.parametrize("model", MODELS)
def test_litellm(url: str, model: str) -> None:
    found = found_by("litellm", url, model)
    assert found["text"] and found["finish"] == "tool_calls"
    assert list(found["call"]) == ["city"] and found["streamed"] == found["call"]
    assert list(found["json_schema"]) == ["city"]
    assert found["too_long"] == "ContextWindowExceededError"


@pytest.mark.parametrize("model", MODELS)
def test_instructor(url: str, model: str) -> None:
    found = found_by("instructor", url, model)
    assert found.keys() == {"tool_call", "json_schema_mode", "partial"}
    assert [types(value) for value in found.values()] == [NOTED_CITY] * 3


@pytest.mark.skipif(not shutil.which("npm"), reason="apt-get install npm")
@pytest.mark.parametrize("model", MODELS)
def test_ai_sdk(url: str, model: str) -> None:
    found = found_by("ai", url, model)
    assert types(found["object"]) == CITY
    assert found["streamed_object"] == found["object"]
    name, arguments, finish = found["call"]
    assert (name, list(arguments), finish) == ("weather", ["city"], "tool-calls")
    assert found["streamed_call"] == [name, arguments]
    assert found["text"]


@pytest.mark.parametrize("model", MODELS)
def test_ollama(url: str, model: str) -> None:
    found = found_by("ollama", url, model)
    assert found["chat"] and found["streamed"] == found["chat"]
    assert found["generate"]
    assert list(found["format"]) == ["city"]
    assert {"auto", "cloud", "edge"} <= set(found["models"])
    assert found["missing"] == 404


@pytest.mark.parametrize("model", MODELS)
def test_lm_eval_scores_choices_by_log_probabilities(url: str, model: str, smollm2: Path, tmp_path: Path) -> None:
    task = (CLIENTS / "lm_eval" / "capitals.yaml").read_text()
    (tmp_path / "capitals.yaml").write_text(task.replace("DATA", str(CLIENTS / "lm_eval" / "capitals.jsonl")))
    named = f"model={model},base_url={url}/v1/completions,tokenizer={smollm2},tokenized_requests=False"
    command = [str(ENVIRONMENT / "bin" / "lm_eval"), "run", "--model", "local-completions", "--model_args", named]
    command += ["--tasks", "isthmus_capitals", "--include_path", str(tmp_path), "--output_path", str(tmp_path / "out")]
    done = run(command)
    assert done.returncode == 0, done.stderr
    (written,) = (tmp_path / "out").rglob("results_*.json")
    found = json.loads(written.read_text())["results"]["isthmus_capitals"]
    print("lm_eval", model, found)
    assert found["acc,none"] > 0.25, "four choices"
