from __future__ import annotations

import io
from collections.abc import Iterator

import pytest
from PIL import Image
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from edge_agent import EdgeAgent, EdgeConfig, api
from edge_agent.metrics import EdgeMetrics
from models.bundle import Bundle


@pytest.fixture
def client(tiny_bundle: Bundle) -> Iterator[TestClient]:
    registry = CollectorRegistry()
    metrics = EdgeMetrics(registry, tiny_bundle.manifest)
    with EdgeAgent(EdgeConfig(tiny_bundle.folder, threads=1), metrics) as agent:
        yield TestClient(api.create_app(registry, (agent, metrics)))


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


@pytest.mark.parametrize(
    ("path", "body", "code", "words"),
    [
        ("/v1/infer", b"", 400, "empty"),
        ("/v1/infer", b"GIF89a not one of ours", 400, "JPEG, PNG, WEBP"),
        ("/v1/infer?deadline_ms=soon", b"x", 400, "deadline_ms"),
        ("/v1/infer?deadline_ms=-5", b"x", 400, "deadline_ms"),
        ("/v1/infer?deadline_ms=nan", b"x", 400, "deadline_ms"),
        ("/v1/nothing", b"x", 404, "Not Found"),
        ("/healthz", b"x", 405, "Method Not Allowed"),
    ],
)
def test_what_is_wrong_is_said_in_one_shape(client: TestClient, path: str, body: bytes, code: int, words: str) -> None:
    reply = client.post(path, content=body)
    assert reply.status_code == code
    error = reply.json()["error"]
    assert error["code"] == code
    assert words in error["message"]


def test_a_body_over_the_cap_is_refused_while_it_arrives(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "MAX_BODY_BYTES", 1000)
    read = 0

    def endless() -> Iterator[bytes]:
        nonlocal read
        for _ in range(1000):
            read += 1
            yield bytes(100)

    reply = client.post("/v1/infer", content=endless())
    assert reply.status_code == 413
    assert "1000 bytes" in reply.json()["error"]["message"]


def test_a_full_house_says_so(client: TestClient, png: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "MAX_WAITING", 0)
    reply = client.post("/v1/infer", content=png)
    assert reply.status_code == 503
    assert reply.headers["retry-after"] == "1"


def test_places_are_given_back(client: TestClient, png: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "MAX_WAITING", 1)
    codes = [client.post("/v1/infer", content=body).status_code for body in (png, b"junk", b"", png)]
    assert codes == [200, 400, 400, 200]


def test_status_tells_bundle_and_link(client: TestClient, tiny_bundle: Bundle) -> None:
    status = client.get("/v1/status").json()
    assert status["bundle"]["fingerprint"] == tiny_bundle.manifest.fingerprint
    assert status["cloud"] is None
    assert client.get("/healthz").status_code == 200


def test_metrics_count_what_happened(client: TestClient, png: bytes) -> None:
    client.post("/v1/infer", content=png)
    client.post("/v1/infer", content=b"junk")
    families = {family.name: family for family in text_string_to_metric_families(client.get("/metrics").text)}
    requests = {
        (sample.labels["route"], sample.labels["outcome"]): sample.value
        for sample in families["isthmus_edge_requests"].samples
        if sample.name.endswith("_total")
    }
    assert requests["fallback", "ok"] + requests["exit", "ok"] == 1
    assert requests["exit", "error"] == 1
