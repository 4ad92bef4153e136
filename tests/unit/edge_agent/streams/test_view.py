"""The live view of cameras: the newest frame, drawn once, by the view and over HTTP."""

from __future__ import annotations

import io
from typing import Any

import pytest
from PIL import Image
from starlette.applications import Starlette
from starlette.testclient import TestClient

from isthmus.edge_agent.http.streams import stream_routes
from isthmus.edge_agent.streams import view as module
from isthmus.edge_agent.streams.frames import Frame
from isthmus.edge_agent.streams.view import StreamView

BOX = {"label": "cat", "index": 0, "score": 0.9, "box": [10.0, 10.0, 900.0, 500.0]}


@pytest.fixture
def view() -> StreamView:
    return StreamView(lambda: {"front": {"frames": 2, "answered": 1}})


def answered(index: int) -> tuple[Frame, dict[str, Any]]:
    frame = Frame("front", index, 0.0, image=Image.new("RGB", (1920, 1080)))
    return frame, {"frame": index, "answers": {"objects": {"kind": "detect", "detections": [BOX]}}}


def test_the_newest_frame_is_drawn_once(view: StreamView, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = list[int]()
    jpeg = module.jpeg
    monkeypatch.setattr(module, "jpeg", lambda shown: drawn.append(shown.index) or jpeg(shown))  # type: ignore[func-returns-value]
    assert view.picture("front") is None and view.picture("other") is None
    for index in range(3):
        view.put(*answered(index))
    pictures = [view.picture("front") for _ in range(5)]
    assert drawn == [2] and len(set(pictures)) == 1
    assert pictures[0] is not None and Image.open(io.BytesIO(pictures[0][1])).size == (960, 540)
    (status,) = view.status()
    assert status["last"]["frame"] == 2 and status["answered"] == 1


def test_a_viewer_is_told_that_it_has_the_newest(view: StreamView) -> None:
    client = TestClient(Starlette(routes=stream_routes(view)))
    assert client.get("/v1/streams").json()["streams"][0]["last"] is None
    assert client.get("/v1/streams/front/picture").status_code == 404
    view.put(*answered(7))
    found = client.get("/v1/streams/front/picture")
    assert found.headers["content-type"] == "image/jpeg"
    again = {"If-None-Match": found.headers["etag"]}
    assert client.get("/v1/streams/front/picture", headers=again).status_code == 304
    view.put(*answered(8))
    assert client.get("/v1/streams/front/picture", headers=again).status_code == 200
