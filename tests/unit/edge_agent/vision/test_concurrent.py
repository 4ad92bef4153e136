"""Many photos at once: slots of the device, batches, asyncio. The link is a fake at its seam `agent.replicas`."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from PIL import Image

from isthmus.edge_agent import EdgeAgent, EdgeConfig
from isthmus.edge_agent.policy.estimates import LinkEstimate
from isthmus.edge_agent.slots import compute_slots
from isthmus.edge_agent.transport.exchanges import Exchange
from isthmus.edge_agent.vision.agent import BATCH_SENT, MAX_THREADS
from isthmus.edge_agent.vision.replicas import Replicas
from isthmus.edge_agent.vision.router import TIME_IS_UP
from isthmus.models.errors import AgentClosed, InvalidInput
from isthmus.models.messages import CloudReply
from isthmus.models.vision.bundle import Bundle
from tests.fake_link import AnyLink, Asked

WAIT_S = 30.0


class HeldLink(AnyLink):
    """Answers each request when `release` is set."""

    estimate = LinkEstimate(0.001, 1e9)

    def __init__(self) -> None:
        self.release = threading.Event()
        self.arrived = threading.Semaphore(0)
        self.sent = 0

    def answer(self, asked: Asked) -> Exchange:
        self.sent += 1
        self.arrived.release()
        assert self.release.wait(WAIT_S)
        return Exchange(CloudReply(((0.25, 0.75),), 0.001, 0.002), 100, 25, 0.02)

    def close(self) -> None:
        self.release.set()


@pytest.fixture
def agent(tiny_bundle: Bundle) -> Iterator[EdgeAgent]:
    with EdgeAgent(EdgeConfig(tiny_bundle.folder, threads=1, deadline_s=60.0, min_agreement=0.0)) as agent:
        agent.replicas = Replicas([HeldLink()])  # type: ignore[list-item]
        yield agent


def held(agent: EdgeAgent) -> HeldLink:
    (link,) = agent.replicas
    assert isinstance(link, HeldLink)
    return link


@pytest.fixture
def counted(agent: EdgeAgent, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Photos that compute at once, each time one begins a segment of the head."""
    counts, at_once, lock = list[int](), [0], threading.Lock()
    segment = agent._head.segment

    def counting(index: int, x_CHW: Any) -> Any:
        with lock:
            at_once[0] += 1
            counts.append(at_once[0])
        try:
            threading.Event().wait(0.002)
            return segment(index, x_CHW)
        finally:
            with lock:
                at_once[0] -= 1

    monkeypatch.setattr(agent._head, "segment", counting)
    return counts


def test_sixteen_threads_compute_no_more_photos_at_once_than_there_are_slots(
    agent: EdgeAgent, counted: list[int], photo: Image.Image
) -> None:
    held(agent).release.set()
    with ThreadPoolExecutor(16) as threads:
        answers = list(threads.map(lambda _: agent.infer(photo, tap="deep"), range(32)))
    assert [answer.route for answer in answers] == ["split"] * 32
    assert len(counted) == 64 and max(counted) <= compute_slots(1)


def test_a_photo_that_waits_for_the_cloud_holds_no_slot(agent: EdgeAgent, photo: Image.Image) -> None:
    count = compute_slots(1) + 2
    with ThreadPoolExecutor(count) as threads:
        calls = [threads.submit(agent.infer, photo, tap="light") for _ in range(count)]
        for _ in range(count):
            assert held(agent).arrived.acquire(timeout=WAIT_S)
        held(agent).release.set()
        assert {call.result(WAIT_S).route for call in calls} == {"split"}


def test_a_photo_that_waited_too_long_is_answered_at_once_and_sends_nothing(
    agent: EdgeAgent, photo: Image.Image
) -> None:
    for _ in range(compute_slots(1)):
        agent._slots.acquire()
    with ThreadPoolExecutor(1) as threads:
        call = threads.submit(agent.infer, photo, 0.001, tap="deep")
        while not agent._slots._waiting:
            pass
        for _ in range(compute_slots(1)):
            agent._slots.release()
        answer = call.result(WAIT_S)
    assert (answer.route, answer.exit, answer.why) == ("fallback", "exit0", TIME_IS_UP)
    assert "wait" in answer.stage_ms and "encode" not in answer.stage_ms
    assert held(agent).sent == 0


@pytest.mark.parametrize(("threads", "cores", "slots"), [(0, 4, 2), (1, 4, 5), (2, 4, 3), (8, 4, 2)])
def test_slots_fill_the_cores(monkeypatch: pytest.MonkeyPatch, threads: int, cores: int, slots: int) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    assert compute_slots(threads) == slots


def test_a_batch_is_answered_in_order_and_taken_as_it_is_needed(agent: EdgeAgent, photo: Image.Image) -> None:
    taken: list[int] = []

    def photos() -> Iterator[Image.Image]:
        for index in range(100):
            taken.append(index)
            yield photo.rotate(index)

    held(agent).release.set()
    answers = agent.infer_many(photos(), tap="light", rate=2)
    assert taken == []
    first = [next(answers) for _ in range(3)]
    assert len(taken) <= 3 + compute_slots(1) + BATCH_SENT
    answers.close()  # type: ignore[attr-defined]
    assert len(taken) < 100
    alone = [agent.infer(photo.rotate(index), tap="light", rate=2).bytes_up for index in range(3)]
    assert [answer.bytes_up for answer in first] == alone


def test_an_error_in_a_batch_names_the_photo(agent: EdgeAgent, photo: Image.Image) -> None:
    held(agent).release.set()
    answers = agent.infer_many([photo, b"not a photo", photo])
    assert next(answers).label
    with pytest.raises(InvalidInput) as caught:
        next(answers)
    assert caught.value.__notes__ == ["at index 1 of the photos"]
    assert list(agent.infer_many([])) == []


def test_photos_before_an_error_of_their_iterable_are_answered(agent: EdgeAgent, photo: Image.Image) -> None:
    def photos() -> Iterator[Image.Image]:
        yield from (photo, photo)
        raise OSError("the camera is gone")

    held(agent).release.set()
    answers = agent.infer_many(photos())
    assert next(answers).label and next(answers).label
    with pytest.raises(OSError, match="the camera is gone"):
        next(answers)


@pytest.mark.parametrize("photos", ["photo.jpg", b"photo", 5, None])
def test_one_photo_is_no_batch(agent: EdgeAgent, photos: Any) -> None:
    with pytest.raises(InvalidInput, match=f"photos is {type(photos).__name__}, expected a list"):
        agent.infer_many(photos)


def test_a_batch_under_way_ends_with_the_agent(agent: EdgeAgent, photo: Image.Image) -> None:
    held(agent).release.set()
    answers = agent.infer_many([photo] * 50)
    next(answers)
    agent.close()
    with pytest.raises(AgentClosed, match="was closed"):
        list(answers)


def test_photos_that_wait_for_a_thread_end_with_the_agent(agent: EdgeAgent, photo: Image.Image) -> None:
    async def test() -> None:
        tasks = [asyncio.create_task(agent.ainfer(photo, tap="light", rate=2)) for _ in range(MAX_THREADS + 1)]
        await asyncio.sleep(0)
        agent.close()
        held(agent).release.set()
        with pytest.raises(AgentClosed, match="was closed"):
            await tasks[-1]
        await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(test())


def test_what_is_wrong_for_every_photo_is_said_before_the_first(agent: EdgeAgent, photo: Image.Image) -> None:
    with pytest.raises(InvalidInput, match="tap 'wide' does not exist"):
        agent.infer_many([photo], tap="wide")
    agent.close()
    with pytest.raises(AgentClosed, match="was closed"):
        agent.infer_many([photo])


def test_asyncio_answers_many_photos_while_the_loop_goes_on(agent: EdgeAgent, photo: Image.Image) -> None:
    async def main() -> list[str]:
        calls = [asyncio.create_task(agent.ainfer(photo, tap="light")) for _ in range(8)]
        while held(agent).sent < 8:
            await asyncio.sleep(0.001)
        held(agent).release.set()
        return [answer.route for answer in await asyncio.gather(*calls)]

    assert asyncio.run(main()) == ["split"] * 8


def test_a_cancelled_task_ends_at_once_and_sends_nothing(agent: EdgeAgent, photo: Image.Image) -> None:
    async def main() -> None:
        for _ in range(compute_slots(1)):
            agent._slots.acquire()
        call = asyncio.create_task(agent.ainfer(photo, tap="light"))
        while not agent._slots._waiting:
            await asyncio.sleep(0.001)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        for _ in range(compute_slots(1)):
            agent._slots.release()
        held(agent).release.set()
        await agent.ainfer(photo, tap="light")

    asyncio.run(main())
    assert held(agent).sent == 1
    assert not agent._slots.full


def test_what_is_wrong_is_said_in_the_task(agent: EdgeAgent) -> None:
    with pytest.raises(InvalidInput, match="a photo is a path, bytes"):
        asyncio.run(agent.ainfer(3))  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match="deadline_s is 0"):
        asyncio.run(agent.ainfer(b"", 0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"deadline_s": "1"}, "deadline_s is '1', expected 0.001 to 600"),
        ({"tasks": 3}, "tasks are 3, expected a list of names"),
        ({"tasks": [3]}, "tasks are .3., expected a list of names"),
        ({"tap": 3}, "tap 3 does not exist"),
        ({"width": "wide"}, "width 'wide' does not exist"),
        ({"rate": "high"}, "rate 'high' does not exist"),
    ],
)
def test_wrong_types_are_named(agent: EdgeAgent, photo: Image.Image, arguments: Any, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        agent.infer(photo, **arguments)


def test_settings_of_another_kind_are_named() -> None:
    with pytest.raises(InvalidInput, match="config is str, expected an EdgeConfig"):
        EdgeAgent("photos")  # type: ignore[arg-type]
