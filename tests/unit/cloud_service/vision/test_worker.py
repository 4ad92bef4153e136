"""The queue and the compute thread; what computes is a fake with the face of `Predictor`."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from isthmus.cloud_service.metrics import IMAGE, CloudMetrics
from isthmus.cloud_service.vision.batching import BatchLimits
from isthmus.cloud_service.vision.predictor import Kind, Probabilities
from isthmus.cloud_service.vision.worker import Worker
from isthmus.models.errors import (
    DeadlineExceeded,
    Draining,
    IsthmusError,
    Overloaded,
    PayloadCorrupt,
    PayloadTooLarge,
    ServiceError,
    UnknownBundle,
)
from isthmus.models.messages import BundleInfo, CloudReply, CloudRequest, Codec, Payload, TapInfo, TaskInfo

FINGERPRINT = bytes(range(32))
INFO = BundleInfo(
    FINGERPRINT, "fake", (TaskInfo("defect", 2), TaskInfo("colour", 2)), (TapInfo("light", 1), TapInfo("deep", 1))
)


class FakeAnswerer:
    """Answers with the payload's first byte; `gate` holds the compute thread back until it is set."""

    def __init__(self) -> None:
        self.info = INFO
        self.gate = threading.Event()
        self.gate.set()
        self.batches: list[list[bytes]] = []
        self.kinds: list[Kind] = []
        self.failure: Exception | None = None

    def check(self, request: CloudRequest) -> None:
        if len(request.payload.data) > 8:
            raise PayloadTooLarge("9 bytes, the cap is 8")

    def answer(self, kind: Kind, payloads: Sequence[Payload]) -> list[Probabilities | IsthmusError]:
        self.gate.wait(10)
        self.kinds.append(kind)
        self.batches.append([payload.data for payload in payloads])
        if self.failure is not None:
            raise self.failure
        return [
            PayloadCorrupt("bad") if p.data == b"bad" else ((p.data[0] / 255, 0.0),) * len(kind.tasks) for p in payloads
        ]


class House:
    """A running worker with its fake and its metrics."""

    def __init__(self, limits: BatchLimits, queue_limit: int) -> None:
        self.fake, self.registry = FakeAnswerer(), CollectorRegistry()
        metrics = CloudMetrics(self.registry, [INFO])
        self.worker = Worker({FINGERPRINT: self.fake}, limits, queue_limit, metrics)  # type: ignore[dict-item]

    def ask(
        self,
        data: bytes,
        budget_s: float = 10.0,
        codec: Codec = Codec.BOTTLENECK,
        tap: int = 0,
        tasks: tuple[int, ...] = (0,),
    ) -> asyncio.Task[CloudReply]:
        request = CloudRequest(1, FINGERPRINT[:8], budget_s, Payload(codec, tap, 0, data), tasks)
        return asyncio.create_task(self.worker.submit(request))

    def count(self, name: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(name, labels)


def scenario(
    play: Callable[[House], Coroutine[Any, Any, None]],
    limits: BatchLimits = BatchLimits(4, 0.0),
    queue_limit: int = 4,
) -> House:
    """Run `play` beside a worker, then drain it."""

    async def both() -> House:
        house = House(limits, queue_limit)
        running = asyncio.create_task(house.worker.run())
        await play(house)
        house.fake.gate.set()
        house.worker.drain()
        await asyncio.wait_for(running, 10)
        return house

    return asyncio.run(both())


async def queued(house: House, count: int) -> None:
    while len(house.worker._waiting) != count:
        await asyncio.sleep(0.001)


def test_each_caller_gets_its_own_answer() -> None:
    async def play(house: House) -> None:
        answers = await asyncio.gather(*(house.ask(bytes([value])) for value in range(4)))
        assert [answer.probabilities[0][0] * 255 for answer in answers] == [0, 1, 2, 3]

    scenario(play)


def test_waiting_inputs_share_a_batch_of_one_codec_tap_and_set_of_tasks() -> None:
    asked: list[tuple[bytes, dict[str, Any]]] = [
        (b"1", {}),
        (b"2", {"codec": Codec.IMAGE}),
        (b"3", {"tap": 1}),
        (b"4", {"tasks": (0, 1)}),
        (b"5", {}),
        (b"6", {"tap": 1}),
    ]

    async def play(house: House) -> None:
        house.fake.gate.clear()
        first = house.ask(b"0")
        await asyncio.sleep(0.02)
        rest = [house.ask(data, **fields) for data, fields in asked]
        await queued(house, 6)
        house.fake.gate.set()
        answers = await asyncio.gather(first, *rest)
        assert [len(answer.probabilities) for answer in answers] == [1, 1, 1, 1, 2, 1, 1]

    house = scenario(play, queue_limit=8)
    assert house.fake.batches == [[b"0"], [b"1", b"5"], [b"2"], [b"3", b"6"], [b"4"]]
    assert house.fake.kinds == [Kind(0, (0,)), Kind(0, (0,)), Kind(None, (0,)), Kind(1, (0,)), Kind(0, (0, 1))]
    inputs = {tap: house.count("isthmus_cloud_inputs_total", model="fake", tap=tap) for tap in ("light", "deep", IMAGE)}
    assert inputs == {"light": 4, "deep": 2, IMAGE: 1}
    tasks = [house.count("isthmus_cloud_task_answers_total", model="fake", task=task) for task in ("defect", "colour")]
    assert tasks == [7, 1]


def test_a_bad_payload_harms_no_other() -> None:
    async def play(house: House) -> None:
        good, bad = house.ask(b"\xff"), house.ask(b"bad")
        assert (await good).probabilities == ((1.0, 0.0),)
        with pytest.raises(PayloadCorrupt):
            await bad

    scenario(play)


def test_a_batch_that_blows_up_is_answered_and_the_worker_lives_on() -> None:
    async def play(house: House) -> None:
        house.fake.failure = KeyError("a bug")
        with pytest.raises(ServiceError):
            await house.ask(b"1")
        house.fake.failure = None
        assert (await house.ask(b"\xff")).probabilities == ((1.0, 0.0),)

    scenario(play)


def test_a_full_queue_refuses_at_once() -> None:
    async def play(house: House) -> None:
        house.fake.gate.clear()
        busy = house.ask(b"0")
        await asyncio.sleep(0.02)
        waiting = [house.ask(b"1") for _ in range(4)]
        await queued(house, 4)
        with pytest.raises(Overloaded):
            await house.ask(b"2")
        house.fake.gate.set()
        await asyncio.gather(busy, *waiting)

    assert scenario(play).count("isthmus_cloud_requests_rejected_total", reason="queue") == 1


def test_a_queue_is_bounded_in_bytes_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("isthmus.cloud_service.vision.worker.MAX_WAITING_BYTES", 15)

    async def play(house: House) -> None:
        house.fake.gate.clear()
        busy = house.ask(b"0")
        await asyncio.sleep(0.02)
        waiting = [house.ask(bytes(8)) for _ in range(2)]
        await queued(house, 2)
        with pytest.raises(Overloaded, match="16 bytes"):
            await house.ask(b"2")
        house.fake.gate.set()
        await asyncio.gather(busy, *waiting)

    assert scenario(play).count("isthmus_cloud_requests_rejected_total", reason="queue") == 1


def test_a_deadline_that_passes_while_it_is_computed_is_counted_and_still_answered() -> None:
    async def play(house: House) -> None:
        house.fake.gate.clear()
        hasty = house.ask(b"\xff", budget_s=0.05)
        await asyncio.sleep(0.1)
        house.fake.gate.set()
        assert (await hasty).probabilities == ((1.0, 0.0),)

    assert scenario(play).count("isthmus_cloud_expired_work_total", stage="compute") == 1


def test_expired_work_is_never_computed() -> None:
    async def play(house: House) -> None:
        house.fake.gate.clear()
        busy = house.ask(b"0")
        await asyncio.sleep(0.02)
        hasty = house.ask(b"1", budget_s=0.01)
        await asyncio.sleep(0.05)
        house.fake.gate.set()
        await busy
        with pytest.raises(DeadlineExceeded):
            await hasty

    house = scenario(play)
    assert house.fake.batches == [[b"0"]]
    assert house.count("isthmus_cloud_expired_work_total", stage="queue") == 1


def test_a_caller_that_has_gone_takes_its_input_along() -> None:
    async def play(house: House) -> None:
        house.fake.gate.clear()
        busy = house.ask(b"0")
        await asyncio.sleep(0.02)
        gone = house.ask(b"1")
        await queued(house, 1)
        gone.cancel()
        await queued(house, 0)
        house.fake.gate.set()
        await busy

    assert scenario(play).fake.batches == [[b"0"]]


def test_draining_refuses_the_new_and_answers_the_old() -> None:
    async def play(house: House) -> None:
        house.fake.gate.clear()
        busy = house.ask(b"0")
        await asyncio.sleep(0.02)
        old = house.ask(b"\xff")
        await queued(house, 1)
        house.worker.drain()
        with pytest.raises(Draining):
            await house.ask(b"2")
        house.fake.gate.set()
        await busy
        assert (await old).probabilities == ((1.0, 0.0),)

    scenario(play)


def test_what_the_bundle_cannot_have_written_is_refused_before_it_is_queued() -> None:
    async def play(house: House) -> None:
        with pytest.raises(PayloadTooLarge):
            await house.ask(bytes(9))

    assert scenario(play).fake.batches == []


def test_an_unknown_bundle_is_told_what_is_held() -> None:
    async def play(house: House) -> None:
        request = CloudRequest(1, bytes(8), 1.0, Payload(Codec.BOTTLENECK, 0, 0, b"1"))
        with pytest.raises(UnknownBundle, match=f"{bytes(8).hex()}.*{FINGERPRINT[:8].hex()}"):
            await house.worker.submit(request)

    scenario(play)
