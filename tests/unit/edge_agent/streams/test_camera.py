"""One camera through a fake agent: what is sent, what is reused, and what happens when something fails."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
from PIL import Image

from isthmus.edge_agent.streams import camera as module
from isthmus.edge_agent.streams.camera import Camera
from isthmus.edge_agent.streams.config import Reuse, StreamConfig
from isthmus.edge_agent.streams.frames import Frame
from isthmus.edge_agent.streams.sources import parse_source
from isthmus.edge_agent.vision.live import LiveWork
from isthmus.models.errors import AgentClosed, LinkDown
from tests.tiny_clip import mjpeg_server, scenes, write_clip

GATE = 0.5
LONG = StreamConfig(reuse=Reuse(most_s=60.0))


class FakeAnswer:
    """What an agent says of a photo: its middle pixel."""

    def __init__(self, photo: Image.Image) -> None:
        self.label = str(photo.getpixel((photo.width // 2, photo.height // 2)))

    def as_dict(self) -> dict[str, Any]:
        return {"answers": {"object": {"label": self.label}}, "degraded": False, "bytes_up": 10, "why": "fake"}


class FakeAgent:
    """The machinery of `infer_many` with a thread or two, and work that may be held up or fail."""

    AT_ONCE: ClassVar[int] = 17

    def __init__(self, fail_at: int | None = None, hold: threading.Event | None = None) -> None:
        self.calls, self.photos, self._fail_at, self._hold = 0, 0, fail_at, hold

    def infer_many(self, photos: Iterable[Image.Image], *, when_full: Any) -> Iterator[Any]:
        self.calls += 1
        threads = ThreadPoolExecutor(2)
        return LiveWork(threads, self._work, photos, self.AT_ONCE, when_full, lambda: None).results()

    def _work(self, photo: Image.Image, degraded: bool) -> FakeAnswer:
        if self._hold is not None:
            self._hold.wait(5)
        self.photos += 1
        if self.photos == self._fail_at:
            raise LinkDown("the agent failed")
        return FakeAnswer(photo)


def watched(
    address: object,
    agent: Any,
    config: StreamConfig = LONG,
    threshold: float | None = GATE,
    **more: Any,
) -> tuple[Camera, list[Frame]]:
    frames: list[Frame] = []
    more.setdefault("stop", threading.Event())
    camera = Camera(
        parse_source(f"front={address}"),
        config,
        frames.append,
        threshold=threshold,
        jitter=lambda low, high: 0.0,
        **more,
    )
    camera.run(agent)
    return camera, frames


def outcomes(frames: list[Frame]) -> list[str | None]:
    return [frame.outcome for frame in frames]


def whole(frames: list[Frame]) -> bool:
    """Whether each number is there once, in order."""
    return [frame.index for frame in frames] == list(range(len(frames)))


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    return write_clip(tmp_path / "clip.mp4", scenes(3, 4, 2))


def test_frames_that_changed_are_answered_and_others_reuse(clip: Path) -> None:
    agent = FakeAgent()
    _, frames = watched(clip, agent)
    assert outcomes(frames) == ["answered", *["reused"] * 2, "answered", *["reused"] * 3, "answered", "reused"]
    assert [frame.repeats.index for frame in frames if frame.repeats] == [0, 0, 3, 3, 3, 7]
    assert agent.photos == 3 and whole(frames)


def test_without_a_threshold_all_are_answered(clip: Path) -> None:
    _, frames = watched(clip, FakeAgent(), threshold=None)
    assert outcomes(frames) == ["answered"] * 9


def test_an_answer_is_reused_only_for_so_long(clip: Path) -> None:
    _, frames = watched(clip, FakeAgent(), StreamConfig(reuse=Reuse(most_s=0.2)))
    assert outcomes(frames)[:4] == ["answered", "reused", "answered", "answered"]


def test_frames_above_the_rate_are_filtered(clip: Path) -> None:
    _, frames = watched(clip, FakeAgent(), StreamConfig(fps=5), threshold=None)
    assert outcomes(frames) == ["answered", "filtered"] * 4 + ["answered"]


def test_a_run_goes_on_after_the_last_frame(clip: Path) -> None:
    _, frames = watched(clip, FakeAgent(), after=4)
    assert [frame.index for frame in frames] == [5, 6, 7, 8]
    assert outcomes(frames)[0] == "answered"  # what an earlier run has seen is not compared with


def test_a_file_goes_on_after_a_fault_of_the_agent(clip: Path) -> None:
    agent = FakeAgent(fail_at=2)
    camera, frames = watched(clip, agent, threshold=None)
    assert whole(frames) and len(frames) == 9 and camera.problem is None
    assert "failed" in outcomes(frames) and agent.calls == 2
    assert outcomes(frames)[-1] in ("answered", "failed")


def test_a_broken_photo_fails_alone(tmp_path: Path) -> None:
    for index, photo in enumerate(scenes(1, 1)):
        photo.save(tmp_path / f"{2 * index}.png")
    (tmp_path / "1.jpg").write_bytes(b"no photo")
    _, frames = watched(tmp_path, FakeAgent())
    assert outcomes(frames) == ["answered", "failed", "answered"] and whole(frames)
    assert frames[1].why


def test_a_camera_that_ends_is_opened_again(monkeypatch: pytest.MonkeyPatch) -> None:
    stop, reopened = threading.Event(), list[str]()

    def on_reopen(why: str) -> None:
        reopened.append(why)
        if len(reopened) == 3:
            stop.set()

    with mjpeg_server(scenes(2, 2)) as url:
        _, frames = watched(url, FakeAgent(), replace(LONG, when_full="block"), stop=stop, on_reopen=on_reopen)
    assert len(reopened) == 3 and whole(frames) and len(frames) == 12
    assert [frame.outcome for frame in frames if frame.index % 4 == 0] == ["answered"] * 3  # nothing outlives a loss


def test_waits_have_full_jitter_and_a_bound() -> None:
    stop = threading.Event()
    drawn: list[tuple[float, float]] = []

    def jitter(low: float, high: float) -> float:
        drawn.append((low, high))
        return 0.0

    source = parse_source("http://127.0.0.1:9/x")
    camera = Camera(source, StreamConfig(reconnect_s=5.0), lambda _: None, threshold=None, stop=stop, jitter=jitter)
    for attempt in range(1, 50):
        camera.wait_s(attempt)
    assert drawn[:4] == [(0, 1), (0, 2), (0, 4), (0, 5)] and drawn[-1] == (0, 5)


def test_a_camera_that_is_not_to_be_opened_again_ends_with_its_problem() -> None:
    with mjpeg_server(scenes(1)) as url:
        pass
    camera, frames = watched(url, FakeAgent(), StreamConfig(reconnect_s=0))
    assert frames == [] and camera.problem is not None and "refused" in camera.problem


def test_a_file_that_cannot_be_read_ends_with_its_problem(tmp_path: Path) -> None:
    (tmp_path / "clip.mp4").write_bytes(b"no video")
    camera, frames = watched(tmp_path / "clip.mp4", FakeAgent())
    assert frames == [] and camera.problem is not None and "clip.mp4" in camera.problem


def until(act: Callable[[], None]) -> Iterator[Image.Image]:
    """No photo; `act` is called when it is asked for one."""
    act()
    yield from ()


@pytest.mark.parametrize("policy", ["drop_oldest", "drop_newest"])
def test_what_is_too_much_is_dropped_and_counted(tmp_path: Path, policy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeAgent, "AT_ONCE", 2)
    hold = threading.Event()

    class Busy(FakeAgent):
        """Answers when every frame was given."""

        def infer_many(self, photos: Iterable[Image.Image], *, when_full: Any) -> Iterator[Any]:
            return super().infer_many(itertools.chain(photos, until(hold.set)), when_full=when_full)

    clip = write_clip(tmp_path / "clip.mp4", scenes(*[1] * 12))
    _, frames = watched(clip, Busy(hold=hold), StreamConfig(when_full=policy), threshold=None)
    assert whole(frames) and len(frames) == 12
    kept = [frame.index for frame in frames if frame.outcome == "answered"]
    assert 4 <= len(kept) <= 5  # under way or waiting, and one more whose answer is being waited for
    assert outcomes(frames).count("dropped") == 12 - len(kept)
    assert kept[-2:] == [10, 11] if policy == "drop_oldest" else kept == list(range(len(kept)))


def test_a_file_waits_for_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "IN_FLIGHT", 2)
    monkeypatch.setattr(FakeAgent, "AT_ONCE", 4)
    clip = write_clip(tmp_path / "clip.mp4", scenes(*[1] * 12))
    _, frames = watched(clip, FakeAgent(), threshold=None)
    assert outcomes(frames) == ["answered"] * 12


def test_a_closed_agent_ends_it(clip: Path) -> None:
    class Closed:
        def infer_many(self, photos: Any, *, when_full: Any) -> Iterator[Any]:
            raise AgentClosed("closed")

    camera, frames = watched(clip, Closed())
    assert frames == [] and camera.problem is None
