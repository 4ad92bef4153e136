from __future__ import annotations

import io
from collections.abc import Iterator

import pytest
from PIL import Image
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.testclient import TestClient

from isthmus.edge_agent import EdgeAgent, EdgeConfig
from isthmus.edge_agent.config import HttpConfig
from isthmus.edge_agent.http.app import create_app
from isthmus.edge_agent.vision.metrics import EdgeMetrics
from isthmus.models.errors import InvalidInput
from isthmus.models.vision.bundle import Bundle

LOCAL = "http://localhost"


@pytest.fixture
def client(tiny_bundle: Bundle) -> Iterator[TestClient]:
    registry = CollectorRegistry()
    metrics = EdgeMetrics(registry, tiny_bundle.manifest)
    with EdgeAgent(EdgeConfig(tiny_bundle.folder, threads=1), metrics) as agent:
        yield TestClient(create_app(registry, (agent, metrics)), base_url=LOCAL)


@pytest.fixture
def png(photo: Image.Image) -> bytes:
    buffer = io.BytesIO()
    photo.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("path", "body", "code", "words"),
    [
        ("/v1/nothing", b"x", 404, "Not Found"),
        ("/healthz", b"x", 405, "Method Not Allowed"),
    ],
)
def test_unknown_paths_and_methods_are_errors_of_the_same_shape(
    client: TestClient, path: str, body: bytes, code: int, words: str
) -> None:
    reply = client.post(path, content=body)
    assert reply.status_code == code
    error = reply.json()["error"]
    assert error["code"] == code
    assert words in error["message"]


def test_the_application_is_healthy_without_a_cloud(client: TestClient) -> None:
    for path in ("/healthz", "/health"):
        assert client.get(path).json() == {"status": "ok"}


def test_pages_of_allowed_origins_alone_may_use_the_api() -> None:
    async def answer(request: Request) -> Response:
        return JSONResponse({})

    page, other = "https://app.example.org", "https://evil.example"
    routes = [Route("/v1/chat/completions", answer, methods=["POST"])]
    for allowed, reads, posts in (((page,), page, 200), ((), None, 403)):
        app = create_app(CollectorRegistry(), None, routes, HttpConfig(allowed_origins=allowed))
        browser = TestClient(app, base_url=LOCAL)
        asked = {"Origin": page, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "x-any"}
        preflight = browser.options("/v1/chat/completions", headers=asked)
        assert preflight.headers.get("access-control-allow-origin") == reads
        reply = browser.post("/v1/chat/completions", headers={"Origin": page, "Sec-Fetch-Site": "cross-site"})
        assert (reply.status_code, reply.headers.get("access-control-allow-origin")) == (posts, reads)
        refused = browser.post("/v1/chat/completions", headers={"Origin": other, "Sec-Fetch-Site": "cross-site"})
        assert (refused.status_code, refused.headers.get("access-control-allow-origin")) == (403, None)


@pytest.mark.parametrize("origin", ["*", "null", "app.example.org", "https://app.example.org/", "https://App.example"])
def test_an_origin_is_as_browsers_send_it(origin: str) -> None:
    with pytest.raises(InvalidInput, match="allowed"):
        HttpConfig(allowed_origins=(origin,))


def test_without_a_bundle_there_are_no_photos_and_routes_of_a_language_model_are_added() -> None:
    async def models(request: Request) -> Response:
        return JSONResponse({"data": []})

    client = TestClient(create_app(CollectorRegistry(), None, [Route("/v1/models", models)]), base_url=LOCAL)
    paths = ("/healthz", "/metrics", "/v1/models", "/v1/infer", "/v1/status")
    assert [client.get(path).status_code for path in paths] == [200, 200, 200, 404, 404]


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
