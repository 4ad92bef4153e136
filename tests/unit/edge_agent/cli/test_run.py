from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from starlette.testclient import TestClient

from isthmus.edge_agent.cli.main import main
from isthmus.edge_agent.config import HttpConfig
from isthmus.models.address import Address, parse_address
from isthmus.models.vision.bundle import Bundle
from tests.bench.tiny_llama import without_template, write_tiny_llama


def invoke(*arguments: str, **environment: str) -> Any:
    return CliRunner().invoke(main, arguments, env=environment)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tiny_llama(tmp_path_factory.mktemp("models") / "tiny", scale=0.3))


def test_run_serves_prompts_alone(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[Any] = []

    def serve(app: Any, http: HttpConfig, announce: Any) -> None:
        announce(Address("127.0.0.1", 12345))
        client = TestClient(app, base_url="http://localhost")
        served.append(client.get("/v1/models").json())
        body = {"model": "auto", "prompt": "hi", "max_tokens": 2}
        served.append(client.post("/v1/completions", json=body).json())
        served.append(client.get("/metrics").text)

    monkeypatch.setattr("isthmus.edge_agent.cli.serve.serve", serve)
    result = invoke("run", "--model", model, "--json", "--threads", "1", "--listen", "127.0.0.1:0")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout) == {"listen": "127.0.0.1:12345", "model": "tiny", "cloud": "no cloud"}
    assert any(entry["id"].startswith("tiny") for entry in served[0]["data"])
    tokens = served[1]["usage"]["completion_tokens"]
    assert 1 <= tokens <= 2
    assert f'isthmus_edge_tokens_total{{source="edge"}} {float(tokens)}' in served[2]


def test_run_says_that_a_model_has_no_chat_template(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = without_template(write_tiny_llama(tmp_path / "plain"))
    statuses: list[tuple[int, str]] = []

    def serve(app: Any, http: HttpConfig, announce: Any) -> None:
        announce(parse_address(http.listen))
        client = TestClient(app, base_url="http://localhost")
        chat = {"model": "auto", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
        text = {"model": "auto", "prompt": "hi", "max_tokens": 2}
        for path, body in (("chat/completions", chat), ("completions", text)):
            answer = client.post(f"/v1/{path}", json=body)
            statuses.append((answer.status_code, answer.text))

    monkeypatch.setattr("isthmus.edge_agent.cli.serve.serve", serve)
    result = invoke("run", "--model", str(folder), "--json", "--threads", "1", "--listen", "127.0.0.1:0")
    assert result.stderr.startswith("warning: plain has no chat template") and result.stderr.count("\n") == 1
    assert [status for status, _ in statuses] == [400, 200] and "no chat template" in statuses[0][1]


def test_run_serves_photos_and_prompts_when_both_are_asked_for(
    model: str, tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    apps: list[Any] = []

    def serve(app: Any, http: HttpConfig, announce: Any) -> None:
        apps.append(app)
        announce(parse_address(http.listen))

    monkeypatch.setattr("isthmus.edge_agent.cli.serve.serve", serve)
    both = ("run", "--model", model, "--json", "--threads", "1", "--bundle", str(tiny_bundle.folder))
    line = json.loads(invoke(*both).stdout)
    assert (line["model"], line["bundle"]) == ("tiny", tiny_bundle.manifest.name)
    assert {"/v1/infer", "/v1/models"} <= {route.path for route in apps[0].routes}
