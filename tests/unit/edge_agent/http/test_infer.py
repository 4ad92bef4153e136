from __future__ import annotations

import asyncio
import gzip
import io
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image
from prometheus_client import CollectorRegistry
from starlette.testclient import TestClient

from isthmus.edge_agent import EdgeAgent, EdgeConfig
from isthmus.edge_agent.config import HttpConfig
from isthmus.edge_agent.http import infer as api
from isthmus.edge_agent.http.app import create_app
from isthmus.edge_agent.vision.metrics import EdgeMetrics
from isthmus.models.vision import images
from isthmus.models.vision.bundle import Bundle

LOCAL = "http://localhost"


@contextmanager
def serving(bundle: Bundle, **http: Any) -> Iterator[TestClient]:
    registry = CollectorRegistry()
    metrics = EdgeMetrics(registry, bundle.manifest)
    with EdgeAgent(EdgeConfig(bundle.folder, threads=1), metrics) as agent:
        yield TestClient(create_app(registry, (agent, metrics), (), HttpConfig(**http)), base_url=LOCAL)


@pytest.fixture
def client(tiny_bundle: Bundle) -> Iterator[TestClient]:
    with serving(tiny_bundle) as client:
        yield client


@pytest.fixture
def png(photo: Image.Image) -> bytes:
    buffer = io.BytesIO()
    photo.save(buffer, "PNG")
    return buffer.getvalue()


def test_a_photo_is_answered(client: TestClient, png: bytes) -> None:
    reply = client.post("/v1/infer?deadline_ms=5000", content=png)
    assert reply.status_code == 200
    answer = reply.json()
    assert answer["label"] in ("good", "bad")
    assert {"probabilities", "route", "exit", "rate", "bytes_up", "stage_ms", "degraded", "why"} <= set(answer)
    assert {"answers", "missing", "tap", "width"} <= set(answer)


def test_the_query_becomes_arguments_of_the_agent(
    client: TestClient, png: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[dict[str, Any]] = []
    infer = EdgeAgent.infer

    def recording(agent: EdgeAgent, photo: bytes, **arguments: Any) -> Any:
        calls.append(arguments)
        return infer(agent, photo, **arguments)

    monkeypatch.setattr(EdgeAgent, "infer", recording)
    monkeypatch.setattr(api, "time", SimpleNamespace(monotonic=lambda: 7.0))  # no time passes before the answer
    query = "tap=light&width=0.5&rate=2&task=defect&task=colour&deadline_ms=1500"
    reply = client.post(f"/v1/infer?{query}", content=png)
    arguments = {"tap": "light", "width": 0.5, "rate": 2, "tasks": ["defect", "colour"], "deadline_s": 1.5}
    assert calls == [arguments]
    answer = reply.json()
    assert (answer["degraded"], answer["missing"], list(answer["answers"])) == (False, ["colour"], ["defect"])
    assert answer["why"].startswith("tap light, width 0.5, rate 2 requested; no cloud is configured")
    client.post("/v1/infer", content=png)
    assert calls[1] == {"tap": None, "tasks": None}


@pytest.mark.parametrize(
    ("path", "body", "code", "words"),
    [
        ("/v1/infer", b"", 400, "empty"),
        ("/v1/infer", b"GIF89a not one of ours", 400, "this GIF file is broken"),
        ("/v1/infer?deadline_ms=soon", b"x", 400, "deadline_ms"),
        ("/v1/infer?deadline_ms=-5", b"x", 400, "deadline_ms"),
        ("/v1/infer?deadline_ms=nan", b"x", 400, "deadline_ms"),
        ("/v1/infer?tap=medium", b"x", 400, "tap 'medium' does not exist, there are light, deep"),
        ("/v1/infer?tap=", b"x", 400, "tap '' does not exist"),
        ("/v1/infer?tap=deep&width=0.5", b"x", 400, "width 0.5 does not exist at tap deep, there are 1"),
        ("/v1/infer?width=wide", b"x", 400, "width is 'wide', expected 0 to 1"),
        ("/v1/infer?width=nan", b"x", 400, "width is 'nan', expected 0 to 1"),
        ("/v1/infer?deadline=5", b"x", 400, "unknown query parameter 'deadline', did you mean 'deadline_ms'?"),
        ("/v1/infer?Rate=1", b"x", 400, "unknown query parameter 'Rate', did you mean 'rate'?"),
        ("/v1/infer?xyz", b"x", 400, "unknown query parameter 'xyz'"),
        ("/v1/infer?rate=7", b"x", 400, "rate 7 does not exist, there are 0 to 2"),
        ("/v1/infer?rate=-1", b"x", 400, "rate is '-1', expected a whole number"),
        ("/v1/infer?rate=1.5", b"x", 400, "rate is '1.5', expected a whole number"),
        ("/v1/infer?rate=" + "9" * 5000, b"x", 400, "expected a whole number"),
        ("/v1/infer?task=size", b"x", 400, "task 'size' does not exist, there are defect, colour"),
        ("/v1/infer?task=defect&task=", b"x", 400, "task '' does not exist"),
    ],
)
def test_errors_have_one_shape(client: TestClient, path: str, body: bytes, code: int, words: str) -> None:
    reply = client.post(path, content=body)
    assert reply.status_code == code
    error = reply.json()["error"]
    assert error["code"] == code
    assert words in error["message"]


def test_a_body_over_the_cap_is_refused_while_it_arrives(tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "MAX_BODY_BYTES", 1000)
    read = 0

    def endless() -> Iterator[bytes]:
        nonlocal read
        for _ in range(1000):
            read += 1
            yield bytes(100)

    with serving(tiny_bundle) as client:
        reply = client.post("/v1/infer", content=endless())
    assert reply.status_code == 413
    assert "1000 bytes" in reply.json()["error"]["message"]


def test_without_a_free_admission_slot_a_request_is_refused(
    tiny_bundle: Bundle, png: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer_late(agent: EdgeAgent, photo: bytes, **arguments: Any) -> Any:
        refused.append(client.post("/v1/infer", content=png))  # while the first one is answered
        return infer(agent, photo, **arguments)

    infer, refused = EdgeAgent.infer, list[Any]()
    monkeypatch.setattr(EdgeAgent, "infer", answer_late)
    with serving(tiny_bundle, max_requests=1) as client, client:
        assert client.post("/v1/infer", content=png).status_code == 200
    assert (refused[0].status_code, refused[0].headers["retry-after"]) == (503, "1")


def test_admission_slots_are_released(tiny_bundle: Bundle, png: bytes) -> None:
    with serving(tiny_bundle, max_requests=1) as client:
        codes = [client.post("/v1/infer", content=body).status_code for body in (png, b"junk", b"", png)]
    assert codes == [200, 400, 400, 200]


def test_a_photo_whose_client_leaves_while_it_waits_is_never_answered(
    tiny_bundle: Bundle, png: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is no free thread; the client disconnects after its upload, and its slot is free again."""
    monkeypatch.setattr(api, "MAX_COMPUTING", 0)
    monkeypatch.setattr(EdgeAgent, "infer", lambda *_, **__: pytest.fail("it was answered"))
    scope = {"type": "http", "method": "POST", "path": "/v1/infer", "query_string": b"", "headers": []}
    sent = list[Any]()

    async def leave_twice(app: Any) -> None:
        messages = iter(2 * [{"type": "http.request", "body": png}, {"type": "http.disconnect"}])

        async def receive() -> Any:
            return next(messages)

        async def send(message: Any) -> None:
            sent.append(message.get("status"))

        for _ in range(2):
            await asyncio.wait_for(app(scope, receive, send), 10)

    with serving(tiny_bundle, max_requests=1) as client:
        asyncio.run(leave_twice(client.app))
        assert 'http_requests_total{code="499",route="/v1/infer"} 2.0' in client.get("/metrics").text
    assert sent == [499, None] * 2


def test_status_says_whether_the_cloud_is_connected(tiny_bundle: Bundle) -> None:
    registry = CollectorRegistry()
    config = EdgeConfig(tiny_bundle.folder, clouds=("127.0.0.1:1", "127.0.0.1:2"), connect_s=0, threads=1)
    with EdgeAgent(config, metrics := EdgeMetrics(registry, tiny_bundle.manifest)) as agent:
        client = TestClient(create_app(registry, (agent, metrics)), base_url=LOCAL)
        status = client.get("/v1/status").json()
    assert status["cloud"] == "unreachable" and status["cloud_problem"]
    assert [(cloud["address"], cloud["state"]) for cloud in status["clouds"]] == [
        ("127.0.0.1:1", "unreachable"),
        ("127.0.0.1:2", "unreachable"),
    ]


def test_status_has_bundle_and_link(client: TestClient, tiny_bundle: Bundle) -> None:
    status = client.get("/v1/status").json()
    assert status["bundle"]["fingerprint"] == tiny_bundle.manifest.fingerprint
    assert status["bundle"]["tasks"] == {"defect": ["good", "bad"], "colour": ["red", "green", "blue"]}
    assert status["bundle"]["taps"] == {
        "light": {"widths": [0.5, 1.0], "rates": 3},
        "deep": {"widths": [1.0], "rates": 2},
    }
    assert status["cloud"] is None and status["clouds"] == []
    assert client.get("/healthz").status_code == 200


def test_waiting_counts_against_the_deadline(client: TestClient, png: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """The upload and the wait for a thread take 2 s: the agent gets what is left, and never less than a millisecond."""
    infer, deadlines = EdgeAgent.infer, []

    def recording(agent: EdgeAgent, photo: bytes, deadline_s: float, **arguments: Any) -> Any:
        deadlines.append(deadline_s)
        return infer(agent, photo, deadline_s, **arguments)

    monkeypatch.setattr(EdgeAgent, "infer", recording)
    monkeypatch.setattr(api, "time", SimpleNamespace(monotonic=itertools.count(0.0, 2.0).__next__))
    for deadline_ms in (5000, 1000):
        assert client.post(f"/v1/infer?deadline_ms={deadline_ms}", content=png).status_code == 200
    assert deadlines == [3.0, api.MIN_DEADLINE_S]


def test_exhausted_memory_is_overload(client: TestClient, png: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(images, "to_rgb", exhausted)
    reply = client.post("/v1/infer", content=png)
    assert (reply.status_code, reply.headers["Retry-After"]) == (503, "1")
    assert "not enough memory" in reply.json()["error"]["message"]


def test_a_form_with_one_file_is_answered(client: TestClient, png: bytes) -> None:
    form, plain = client.post("/v1/infer", files={"file": png}), client.post("/v1/infer", content=png)
    assert (form.status_code, form.json()["label"]) == (200, plain.json()["label"])
    none = client.post("/v1/infer", files={"a": (None, "b")})
    assert (none.status_code, none.json()["error"]["message"]) == (
        400,
        "the multipart form has no file: no part has a file name",
    )


def test_a_body_that_is_no_image_file_is_named(client: TestClient, png: bytes) -> None:
    replies = [
        client.post("/v1/infer", content=b'--x\r\nContent-Disposition: form-data; name="f"\r\n\r\n' + png),
        client.post("/v1/infer", content=gzip.compress(png)),
    ]
    for reply, words in zip(replies, ("this is a multipart form", "this is gzip data"), strict=True):
        assert reply.status_code == 400
        assert words in reply.json()["error"]["message"]


@pytest.mark.parametrize(
    ("query", "headers", "expected"),
    [
        ("?private=1", {}, {"private": True}),
        ("?private=no&explain=true", {}, {"explain": True}),
        ("", {"X-Isthmus-Private": "yes"}, {"private": True}),
        ("", {"X-Isthmus-Private": "0"}, {}),
    ],
)
def test_privacy_and_explanations_are_asked_for_by_query_or_header(
    client: TestClient,
    png: bytes,
    monkeypatch: pytest.MonkeyPatch,
    query: str,
    headers: dict[str, str],
    expected: dict[str, bool],
) -> None:
    calls: list[dict[str, Any]] = []
    infer = EdgeAgent.infer

    def recording(agent: EdgeAgent, photo: bytes, **arguments: Any) -> Any:
        calls.append(arguments)
        return infer(agent, photo, **arguments)

    monkeypatch.setattr(EdgeAgent, "infer", recording)
    reply = client.post(f"/v1/infer{query}", content=png, headers=headers)
    assert calls == [{"tap": None, "tasks": None} | expected]
    assert ("candidates" in reply.json()) == ("explain" in expected)
    private_and_forced = client.post("/v1/infer?private=1&rate=1", content=png)
    assert private_and_forced.status_code == 400
    assert "private photos are not sent" in private_and_forced.json()["error"]["message"]


def test_the_status_names_profile_and_budgets(client: TestClient) -> None:
    status = client.get("/v1/status").json()
    assert (status["profile"], status["budgets"]) == ("wifi", [])
