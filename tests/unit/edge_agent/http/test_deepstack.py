"""Calls as DeepStack's clients make them: Frigate's detector, Home Assistant, Blue Iris."""

from __future__ import annotations

import io
from collections.abc import Iterator

import pytest
from PIL import Image
from prometheus_client import CollectorRegistry
from starlette.testclient import TestClient

from isthmus.edge_agent import EdgeAgent, EdgeConfig
from isthmus.edge_agent.config import HttpConfig
from isthmus.edge_agent.http.app import create_app
from isthmus.edge_agent.vision.metrics import EdgeMetrics
from isthmus.models.vision.bundle import Bundle
from tests.tiny_detector import write_tiny_detector

PATH = "/v1/vision/detection"
BOX = {"x_min": 64, "y_min": 0, "x_max": 128, "y_max": 64}


def serving(bundle: Bundle) -> Iterator[TestClient]:
    registry = CollectorRegistry()
    metrics = EdgeMetrics(registry, bundle.manifest)
    with EdgeAgent(EdgeConfig(bundle.folder, threads=1), metrics) as agent:
        yield TestClient(create_app(registry, (agent, metrics), (), HttpConfig()), base_url="http://localhost")


@pytest.fixture(scope="module", params=[True, False], ids=["exits", "no exits"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[TestClient, bool]]:
    bundle = write_tiny_detector(tmp_path_factory.mktemp("zoo") / "detector", exits=request.param, fit="stretch")
    for client in serving(bundle):
        yield client, request.param


@pytest.fixture
def jpeg() -> bytes:
    photo = Image.new("RGB", (256, 256), (255, 255, 255))
    photo.paste((230, 20, 20), (64, 0, 128, 64))
    buffer = io.BytesIO()
    photo.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("fields", "count"),
    [({}, 1), ({"min_confidence": "0.4"}, 1), ({"min_confidence": "40"}, 1), ({"min_confidence": "1"}, 0)],
)
def test_boxes_are_predictions(case: tuple[TestClient, bool], jpeg: bytes, fields: dict[str, str], count: int) -> None:
    client, exits = case
    reply = client.post(PATH, files={"image": ("a.jpg", jpeg)}, data=fields)
    body = reply.json()
    if not exits:
        assert (reply.status_code, body["success"]) == (503, False) and "no cloud answered" in body["error"]
        return
    assert (reply.status_code, body["success"], body["count"]) == (200, True, count)
    assert isinstance(body["duration"], int)
    for found in body["predictions"]:
        assert found.pop("confidence") > 0.4
        assert found == {"label": "red", **BOX}


@pytest.mark.parametrize(
    ("fields", "image", "words"),
    [
        ({"min_confidence": "much"}, None, "min_confidence is 'much', expected 0 to 1"),
        ({"min_confidence": "-1"}, None, "min_confidence"),
        ({"min_confidence": "nan"}, None, "min_confidence"),
        ({}, b"no photo", "format is unknown"),
    ],
)
def test_errors_have_deepstacks_shape(
    case: tuple[TestClient, bool], jpeg: bytes, fields: dict[str, str], image: bytes | None, words: str
) -> None:
    reply = case[0].post(PATH, files={"image": ("a.jpg", image or jpeg)}, data=fields)
    assert (reply.status_code, reply.json()["success"]) == (400, False)
    assert words in reply.json()["error"]


def test_a_form_without_a_photo_and_an_empty_body_are_refused(case: tuple[TestClient, bool]) -> None:
    for reply in (case[0].post(PATH, data={"min_confidence": "0.4"}), case[0].post(PATH)):
        assert (reply.status_code, reply.json()["success"]) == (400, False)


def test_a_bundle_that_does_not_detect_has_no_such_path(tiny_bundle: Bundle, jpeg: bytes) -> None:
    for client in serving(tiny_bundle):
        assert client.post(PATH, files={"image": ("a.jpg", jpeg)}).status_code == 404
