"""Requests to the API through starlette's test client, and checks of its responses."""

from __future__ import annotations

import json
from typing import Any

from starlette.applications import Starlette
from starlette.testclient import TestClient

from isthmus.edge_agent.http.openai.routes import routes
from isthmus.edge_agent.http.openai.state import Limits
from tests.unit.edge_agent.language.scripted import ScriptedBackend

HI: Any = [{"role": "user", "content": "hi"}]
LIMITS = Limits()
CHAT = "/v1/chat/completions"


def client(backend: ScriptedBackend, limits: Limits = LIMITS) -> TestClient:
    return TestClient(Starlette(routes=routes(backend, limits)))


def post(backend: ScriptedBackend, path: str = CHAT, headers: Any = None, **fields: Any) -> Any:
    prompt = {"messages": HI} if path == CHAT else {"prompt": "hi"}
    return client(backend).post(path, json={"model": "auto", **prompt, **fields}, headers=headers)


def events(backend: ScriptedBackend, path: str = CHAT, **fields: Any) -> list[Any]:
    """The data of every event, [DONE] as text."""
    response = post(backend, path, stream=True, **fields)
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    parts = response.text.split("\n\n")
    assert parts.pop() == ""
    assert all(part.startswith("data: ") and "\n" not in part for part in parts)
    return [json.loads(data) if (data := part[6:]) != "[DONE]" else data for part in parts]


def assert_error(response: Any, status: int, **expected: object) -> None:
    assert response.status_code == status
    error = response.json()["error"]
    assert list(error) == ["message", "type", "param", "code"]
    assert "\n" not in error["message"]
    assert {name: error[name] for name in expected} == expected
