"""What every request passes first, and how it is counted at its end."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from isthmus.edge_agent.http.guard import DISCARDED_BYTES, Guard
from isthmus.edge_agent.http.metrics import HttpMetrics
from isthmus.edge_agent.http.origins import OriginPolicy

ROUTES = [Route("/v1/models", print), Route("/v1/models/{id:path}", print), Route("/healthz", print)]


class Guarded:
    """A guard around one application, with what it has counted."""

    def __init__(self, app: Any, token: str = "") -> None:
        self.registry = CollectorRegistry()
        metrics = HttpMetrics(self.registry, [route.path_format for route in ROUTES])
        self.guard = Guard(app, ROUTES, OriginPolicy("127.0.0.1:80", ()), metrics, timeout_s=0.05, token=token)
        self.client = TestClient(self.guard, base_url="http://localhost", raise_server_exceptions=False)

    def counted(self) -> dict[tuple[str, str], float]:
        (family,) = self.registry.collect()
        samples = [sample for sample in family.samples if sample.name.endswith("_total") and sample.value]
        return {(sample.labels["route"], sample.labels["code"]): sample.value for sample in samples}


async def echo(scope: Any, receive: Any, send: Any) -> None:
    await PlainTextResponse(scope["path"], 418 if scope["method"] == "POST" else 200)(scope, receive, send)


async def broken(scope: Any, receive: Any, send: Any) -> None:
    raise ZeroDivisionError


def test_requests_are_counted_by_route_and_code() -> None:
    guarded = Guarded(echo)
    for path in ("/v1/models", "/v1/models/a", "/v1/models/b/c", "/x", "/y?z", "/healthz"):
        guarded.client.get(path)
    guarded.client.post("/v1/models")
    guarded.client.post("/v1/models", headers={"Origin": "https://evil.example"})
    guarded.client.get("/v1/models", headers={"Host": "evil.example"})
    assert guarded.counted() == {
        ("/v1/models", "200"): 1,
        ("/v1/models", "403"): 2,
        ("/v1/models", "418"): 1,
        ("/v1/models/{id}", "200"): 2,
        ("/healthz", "200"): 1,
        ("other", "200"): 2,
    }


def test_what_fails_is_counted_and_the_health_check_answers_all_the_same() -> None:
    guarded = Guarded(broken)
    assert guarded.client.get("/v1/models").status_code == 500
    health = guarded.client.get("/healthz", headers={"Host": "evil.example"})
    assert (health.status_code, health.json()) == (200, {"status": "ok"})
    assert guarded.counted() == {("/v1/models", "500"): 1, ("/healthz", "200"): 1}


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/a", "/v1/models/b/c"])
def test_a_slash_at_the_end_of_a_path_is_ignored(path: str) -> None:
    guarded = Guarded(echo)
    assert [guarded.client.get(each).text for each in (path, path + "/")] == [path, path]
    assert guarded.client.get("/").text == "/"


def test_a_client_that_leaves_before_the_end_is_counted() -> None:
    async def streams(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        assert (await receive())["type"] == "http.disconnect"

    async def receive() -> Any:
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None: ...

    guarded = Guarded(streams)
    scope = {"type": "http", "method": "GET", "path": "/v1/models", "headers": [(b"host", b"localhost")]}
    asyncio.run(guarded.guard(scope, receive, send))
    assert guarded.counted() == {("/v1/models", "499"): 1}


@pytest.mark.parametrize(("parts", "read"), [(3, 4), (None, DISCARDED_BYTES >> 20)])
def test_the_body_of_a_refused_request_is_read_to_its_end_or_so_far(parts: int | None, read: int) -> None:
    events: list[Any] = []

    async def receive() -> Any:
        events.append("read")
        return {"type": "http.request", "body": bytes(1 << 20), "more_body": len(events) != read or parts is None}

    async def send(message: Any) -> None:
        events.append(message["type"])

    scope = {"type": "http", "method": "POST", "path": "/v1/models", "headers": [(b"host", b"evil.example")]}
    asyncio.run(Guarded(echo).guard(scope, receive, send))
    assert events == ["read"] * read + ["http.response.start", "http.response.body"]


def test_a_refused_client_that_sends_no_body_is_answered_after_the_timeout_and_one_that_asks_first_at_once() -> None:
    async def receive() -> Any:
        received.append(1)
        await asyncio.Event().wait()

    async def send(message: Any) -> None:
        sent.append(message)

    received, sent = list[int](), list[Any]()
    for more in ([], [(b"expect", b"100-continue")]):
        headers = [(b"host", b"evil.example"), *more]
        scope = {"type": "http", "method": "POST", "path": "/v1/models", "headers": headers}
        asyncio.run(Guarded(echo).guard(scope, receive, send))
    assert (len(received), len(sent)) == (1, 4)


def test_a_disconnect_after_the_end_is_none() -> None:
    async def complete(scope: Any, receive: Any, send: Any) -> None:
        await echo(scope, receive, send)
        await receive()

    guarded = Guarded(complete)
    guarded.client.get("/v1/models")
    assert guarded.counted() == {("/v1/models", "200"): 1}


def test_with_a_token_everything_but_health_and_what_browsers_ask_first_needs_it() -> None:
    client = Guarded(echo, token="secret").client
    for header in (
        None,
        "secret",
        "Bearer",
        "Bearer ",
        "Bearer secre",
        "Bearer secret2",
        "bearer secret",
        "Basic secret",
    ):
        reply = client.get("/v1/models", headers={"Authorization": header} if header else {})
        assert (reply.status_code, reply.headers["www-authenticate"]) == (401, "Bearer")
        assert "secret" not in reply.text
    assert client.get("/v1/models", headers={"Authorization": "Bearer secret"}).status_code == 200
    assert client.get("/v1/models", headers={b"Authorization": b"Bearer \xff\xfe"}).status_code == 401
    assert client.get("/healthz").status_code == client.options("/v1/models").status_code == 200
    evil = {"Authorization": "Bearer secret", "Origin": "https://evil.example"}
    assert client.post("/v1/models", headers=evil).status_code == 403
