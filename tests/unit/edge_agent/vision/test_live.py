from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from isthmus.edge_agent.vision.live import WAITING, Dropped, LiveWork, WhenFull

WAIT_S = 30.0


class Camera:
    """Gives all its frames while the work on the first is held."""

    def __init__(self, frames: int) -> None:
        self.frames = frames
        self.gave_all, self.release = threading.Event(), threading.Event()

    def __iter__(self) -> Iterator[int]:
        yield from range(self.frames)
        self.gave_all.set()


def run(when_full: WhenFull, frames: int = 10, at_once: int = 2) -> tuple[list[int | Dropped], list[int], int]:
    """Results, the frames that were degraded, and how many drops were counted, while nothing is done at first."""
    camera, degraded, drops = Camera(frames), list[int](), list[None]()

    def work(frame: int, degrade: bool) -> int:
        if degrade:
            degraded.append(frame)
        else:
            assert camera.release.wait(WAIT_S)
        return frame

    with ThreadPoolExecutor(8) as threads:
        live = LiveWork(threads, work, camera, at_once, when_full, lambda: drops.append(None))
        results, found = live.results(), list[int | Dropped]()
        starter = threading.Thread(target=lambda: found.extend(results))
        starter.start()
        if when_full != "degrade":
            assert camera.gave_all.wait(WAIT_S)
        camera.release.set()
        starter.join(WAIT_S)
    return found, degraded, len(drops)


def frames_of(found: list[int | Dropped]) -> list[int]:
    """Every frame once: the answered ones and those of each drop."""
    return [
        index
        for each in found
        for index in (range(each.index, each.index + each.count) if isinstance(each, Dropped) else [each])
    ]


@pytest.mark.parametrize("when_full", ["drop_oldest", "drop_newest", "degrade"])
def test_each_frame_is_accounted_for_in_order(when_full: WhenFull) -> None:
    found, _, drops = run(when_full)
    assert frames_of(found) == list(range(10))
    assert drops == sum(each.count for each in found if isinstance(each, Dropped))


def test_the_oldest_frames_are_dropped_first() -> None:
    found, _, drops = run("drop_oldest")
    assert found[-WAITING:] == [8, 9] and 0 in found
    assert drops >= 10 - 3 - WAITING


def test_the_newest_frames_are_dropped_first() -> None:
    found, _, drops = run("drop_newest")
    assert found[:2] == [0, 1] and isinstance(found[-1], Dropped)
    assert drops >= 10 - 3 - WAITING


def test_degraded_frames_are_answered_and_none_is_dropped() -> None:
    found, degraded, drops = run("degrade")
    assert found == list(range(10)) and drops == 0 and degraded


def test_an_error_of_the_work_names_its_frame_and_one_of_the_source_comes_last() -> None:
    def work(frame: int, degrade: bool) -> int:
        if frame == 1:
            raise ValueError("broken")
        return frame

    def source() -> Iterator[int]:
        yield 0
        raise OSError("the camera is gone")

    with ThreadPoolExecutor(2) as threads:
        results = LiveWork(threads, work, range(3), 4, "drop_newest", lambda: None).results()
        assert next(results) == 0
        with pytest.raises(ValueError, match="broken") as caught:
            next(results)
        assert caught.value.__notes__ == ["at index 1 of the photos"]
        results = LiveWork(threads, work, source(), 4, "drop_newest", lambda: None).results()
        assert next(results) == 0
        with pytest.raises(OSError, match="the camera is gone"):
            next(results)
