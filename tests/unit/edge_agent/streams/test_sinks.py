"""Results survive a kill; receivers that are slow or absent hold up nothing and are counted."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from isthmus.edge_agent.streams.config import Mqtt
from isthmus.edge_agent.streams.frames import Frame
from isthmus.edge_agent.streams.sinks.background import MOST_WAITING, Background
from isthmus.edge_agent.streams.sinks.lines import Lines, last_frames
from isthmus.edge_agent.streams.sinks.mqtt import MqttSink
from isthmus.edge_agent.streams.sinks.pictures import Pictures, annotated
from isthmus.edge_agent.streams.sinks.webhook import Webhook
from isthmus.models.errors import InvalidInput, LinkDown

LABEL = {"object": {"label": "cat", "index": 3, "confidence": 0.9}}
BOXES = {
    "things": {"kind": "detect", "detections": [{"label": "car", "index": 2, "score": 0.8, "box": [5, 9, 40, 30]}]}
}


def test_what_a_kill_cut_off_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text('{"camera": "a", "frame": 0}\n{"camera": "b", "frame": 7}\n{"event": "end"}\n{"camera": "a", "fra')
    assert last_frames(path) == {"a": 0, "b": 7}
    lines = Lines(path)
    lines.write({"camera": "a", "frame": 1})
    lines.close()
    assert [json.loads(line) for line in path.read_text().splitlines()][-1] == {"camera": "a", "frame": 1}
    assert last_frames(path) == {"a": 1, "b": 7} and last_frames(tmp_path / "none") == {}


@pytest.mark.parametrize("text", ["no json\n", '{"frame": "x", "camera": "a"}\n', '{"frame": 3}\n', "3\n"])
def test_a_file_of_something_else_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text(text)
    with pytest.raises(InvalidInput, match=r"results\.jsonl:1"):
        last_frames(path)


def test_nothing_is_added_to_or_cut_from_another_file(tmp_path: Path) -> None:
    path = tmp_path / "photo.jpg"
    path.write_bytes(b"\xff\xd8 a photo")
    with pytest.raises(InvalidInput, match=r"photo\.jpg does not end"):
        Lines(path)
    assert path.read_bytes() == b"\xff\xd8 a photo"


def test_a_full_disk_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="cannot be written"):
        Lines(tmp_path)
    with pytest.raises(InvalidInput, match="No space left"):
        Lines(Path("/dev/full")).write({})


def test_a_receiver_that_hangs_holds_up_nothing() -> None:
    hold, taken, lost = threading.Event(), list[int](), list[str]()

    def deliver(item: int) -> None:
        hold.wait(5)
        taken.append(item)

    sink = Background("webhook", deliver, lost.append)
    for item in range(2 * MOST_WAITING):
        sink.put(item)
    hold.set()
    sink.close()
    assert len(taken) + len(lost) == 2 * MOST_WAITING and len(lost) >= MOST_WAITING - 1
    assert taken[-1] == 2 * MOST_WAITING - 1 and taken == sorted(taken)


def test_what_is_not_accepted_is_counted_and_the_next_one_tried() -> None:
    lost, taken = list[str](), list[int]()

    def deliver(item: int) -> None:
        if item < 2:
            raise LinkDown("gone")
        taken.append(item)

    sink = Background("webhook", deliver, lost.append)
    for item in range(3):
        sink.put(item)
    sink.close()
    assert (lost, taken) == (["webhook"] * 2, [2])


def test_a_webhook_gets_json_and_its_token_is_in_no_error() -> None:
    asked: list[Any] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(json.loads(request.content))
        if len(asked) == 3:
            raise httpx.ConnectTimeout("…")
        return httpx.Response(204 if len(asked) == 1 else 302)

    hook = Webhook("https://hooks.example/x?token=secret", httpx.MockTransport(answer))
    hook({"frame": 0})
    for expected in ("answers 302", "ConnectTimeout"):
        with pytest.raises(LinkDown, match=expected) as caught:
            hook({"frame": 1})
        assert "secret" not in str(caught.value)
    assert asked == [{"frame": 0}, {"frame": 1}, {"frame": 1}]


def test_answers_are_drawn() -> None:
    grey = Image.new("RGB", (64, 48), (90, 90, 90))
    for answers in (LABEL, BOXES, {**LABEL, **BOXES}):
        assert annotated(grey, answers).tobytes() != grey.tobytes()
    assert annotated(grey, {}).tobytes() == grey.tobytes()


def test_the_newest_pictures_are_kept(tmp_path: Path) -> None:
    (tmp_path / "front-mine.jpg").write_bytes(b"not ours")
    for first in (0, 3):  # two runs
        pictures = Pictures(tmp_path, keep=2)
        for index in range(first, first + 3):
            frame = Frame("front", index, 0.0, answer={"answers": LABEL})
            pictures((frame, Image.new("RGB", (32, 32))))
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["front-00000004.jpg", "front-00000005.jpg", "front-mine.jpg"]


def test_an_authority_that_is_none_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text("no certificate")
    with pytest.raises(InvalidInput, match=r"ca\.pem"):
        MqttSink("127.0.0.1:1", Mqtt(ca=tmp_path / "ca.pem"), "photos")
