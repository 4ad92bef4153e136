"""The queue and the compute thread, with a scripted `Predictor`."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Hashable, Sequence
from typing import Any

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from isthmus.cloud_service.metrics import IMAGE, CloudMetrics
from isthmus.cloud_service.vision import worker
from isthmus.cloud_service.vision.batching import BatchLimits
from isthmus.cloud_service.vision.compute_time import ComputeTimes
from isthmus.cloud_service.vision.decode_process import ImageInput, Pixels
from isthmus.cloud_service.vision.predictor import Kind, TaskAnswers
from isthmus.cloud_service.vision.worker import Worker
from isthmus.models.errors import (
    DeadlineExceeded,
    Draining,
    InvalidInput,
    IsthmusError,
    Overloaded,
    PayloadCorrupt,
    PayloadTooLarge,
    ServiceError,
    UnknownBundle,
)
from isthmus.models.messages import BundleInfo, CloudReply, CloudRequest, Codec, Payload, TapInfo, TaskInfo
from isthmus.models.vision.images import View

FINGERPRINT = bytes(range(32))
INFO = BundleInfo(
    FINGERPRINT, "fake", (TaskInfo("defect", 2), TaskInfo("colour", 2)), (TapInfo("light", 1), TapInfo("deep", 1))
)


class FakePredictor:
    """Answers with the payload's first byte; `gate` holds the compute thread back until it is set."""

    image_input = ImageInput(100, View(1, (1, 1)))

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

    def predict(self, kind: Kind, inputs: Sequence[Payload | Pixels]) -> list[TaskAnswers | IsthmusError]:
        self.gate.wait(10)
        self.kinds.append(kind)
        found = [given.data if isinstance(given, Payload) else given.tobytes() for given in inputs]
        self.batches.append(found)
        if self.failure is not None:
            raise self.failure
        return [PayloadCorrupt("bad") if d == b"bad" else ((d[0] / 255, 0.0),) * len(kind.tasks) for d in found]


class FakeDecoder:
    """An image's pixels are its bytes. `gate` holds it back; `failures` are raised."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.gate.set()
        self.failures: dict[bytes, Exception] = {}
        self.decoded: list[bytes] = []
        self.starts = self.closed = 0
        self.failed_starts = 0  # of the next ones

    async def start(self) -> None:
        self.starts += 1
        if self.failed_starts:
            self.failed_starts -= 1
            raise ServiceError("no process")

    async def decode(self, data: bytes, spec: ImageInput) -> Pixels:
        assert spec == FakePredictor.image_input
        self.decoded.append(data)
        await self.gate.wait()
        if data in self.failures:
            raise self.failures[data]
        return np.frombuffer(data, np.uint8)

    async def close(self) -> None:
        self.closed += 1


class ScriptedTimes(ComputeTimes):
    """Predicts `each_s` for each input of a batch."""

    each_s = 0.0

    def predict(self, key: Hashable, size: int) -> float:
        return self.each_s * size


class WorkerHarness:
    """A running worker with its scripted predictor and its metrics. Batches are expected to take no time."""

    def __init__(self, limits: BatchLimits, queue_limit: int) -> None:
        self.fake, self.registry = FakePredictor(), CollectorRegistry()
        metrics = CloudMetrics(self.registry, [INFO])
        self.decoder = FakeDecoder()
        self.worker = Worker([self.fake], [self.decoder], limits, queue_limit, metrics)  # type: ignore[list-item]
        self.worker._times = self.times = ScriptedTimes()

    def ask(
        self,
        data: bytes,
        budget_s: float = 10.0,
        codec: Codec = Codec.BOTTLENECK,
        tap: int = 0,
        tasks: tuple[int, ...] = (0,),
        peer: str = "",
    ) -> asyncio.Task[CloudReply]:
        request = CloudRequest(1, FINGERPRINT[:8], budget_s, Payload(codec, tap, 0, data), tasks)
        return asyncio.create_task(self.worker.submit(request, peer))

    def count(self, name: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(name, labels)


def scenario(
    play: Callable[[WorkerHarness], Coroutine[Any, Any, None]],
    limits: BatchLimits = BatchLimits(4, 0.0),
    queue_limit: int = 4,
) -> WorkerHarness:
    """Run `play` beside a worker, then drain it."""

    async def both() -> WorkerHarness:
        harness = WorkerHarness(limits, queue_limit)
        running = asyncio.create_task(harness.worker.run())
        await play(harness)
        harness.fake.gate.set()
        harness.worker.drain()
        await asyncio.wait_for(running, 10)
        return harness

    return asyncio.run(both())


async def queued(harness: WorkerHarness, count: int) -> None:
    while len(harness.worker._pending) != count:
        await asyncio.sleep(0.001)


def test_each_caller_gets_its_own_answer() -> None:
    async def play(harness: WorkerHarness) -> None:
        answers = await asyncio.gather(*(harness.ask(bytes([value])) for value in range(4)))
        assert [predict.probabilities[0][0] * 255 for predict in answers] == [0, 1, 2, 3]

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

    async def play(harness: WorkerHarness) -> None:
        harness.fake.gate.clear()
        first = harness.ask(b"0")
        await asyncio.sleep(0.02)
        rest = [harness.ask(data, **fields) for data, fields in asked]
        await queued(harness, 6)
        await asyncio.sleep(0.01)  # the image is decoded meanwhile
        harness.fake.gate.set()
        answers = await asyncio.gather(first, *rest)
        assert [len(predict.probabilities) for predict in answers] == [1, 1, 1, 1, 2, 1, 1]

    harness = scenario(play, queue_limit=8)
    assert harness.fake.batches == [[b"0"], [b"1", b"5"], [b"2"], [b"3", b"6"], [b"4"]]
    assert harness.fake.kinds == [Kind(0, (0,)), Kind(0, (0,)), Kind(None, (0,)), Kind(1, (0,)), Kind(0, (0, 1))]
    inputs = {
        tap: harness.count("isthmus_cloud_inputs_total", model="fake", tap=tap) for tap in ("light", "deep", IMAGE)
    }
    assert inputs == {"light": 4, "deep": 2, IMAGE: 1}
    tasks = [
        harness.count("isthmus_cloud_task_answers_total", model="fake", task=task) for task in ("defect", "colour")
    ]
    assert tasks == [7, 1]


def test_a_bad_payload_affects_no_other() -> None:
    async def play(harness: WorkerHarness) -> None:
        good, bad = harness.ask(b"\xff"), harness.ask(b"bad")
        assert (await good).probabilities == ((1.0, 0.0),)
        with pytest.raises(PayloadCorrupt):
            await bad

    scenario(play)


def test_a_batch_that_raises_is_answered_with_errors_and_the_worker_goes_on() -> None:
    async def play(harness: WorkerHarness) -> None:
        harness.fake.failure = KeyError("a bug")
        with pytest.raises(ServiceError):
            await harness.ask(b"1")
        harness.fake.failure = None
        assert (await harness.ask(b"\xff")).probabilities == ((1.0, 0.0),)

    scenario(play)


def test_a_full_queue_refuses_at_once() -> None:
    async def play(harness: WorkerHarness) -> None:
        harness.fake.gate.clear()
        busy = harness.ask(b"0")
        await asyncio.sleep(0.02)
        waiting = [harness.ask(b"1") for _ in range(4)]
        await queued(harness, 4)
        with pytest.raises(Overloaded):
            await harness.ask(b"2")
        harness.fake.gate.set()
        await asyncio.gather(busy, *waiting)

    assert scenario(play).count("isthmus_cloud_requests_rejected_total", reason="queue") == 1


def test_a_queue_is_bounded_in_bytes_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("isthmus.cloud_service.vision.worker.MAX_QUEUED_BYTES", 15)

    async def play(harness: WorkerHarness) -> None:
        harness.fake.gate.clear()
        busy = harness.ask(b"0")
        await asyncio.sleep(0.02)
        waiting = [harness.ask(bytes(8)) for _ in range(2)]
        await queued(harness, 2)
        with pytest.raises(Overloaded, match="16 bytes"):
            await harness.ask(b"2")
        harness.fake.gate.set()
        await asyncio.gather(busy, *waiting)

    assert scenario(play).count("isthmus_cloud_requests_rejected_total", reason="queue") == 1


def test_a_deadline_that_passes_while_it_is_computed_is_counted_and_still_answered() -> None:
    async def play(harness: WorkerHarness) -> None:
        harness.fake.gate.clear()
        hasty = harness.ask(b"\xff", budget_s=0.05)
        await asyncio.sleep(0.1)
        harness.fake.gate.set()
        assert (await hasty).probabilities == ((1.0, 0.0),)

    assert scenario(play).count("isthmus_cloud_expired_work_total", stage="compute") == 1


def test_expired_work_is_never_computed() -> None:
    async def play(harness: WorkerHarness) -> None:
        harness.fake.gate.clear()
        busy = harness.ask(b"0")
        await asyncio.sleep(0.02)
        hasty = harness.ask(b"1", budget_s=0.01)
        await asyncio.sleep(0.05)
        harness.fake.gate.set()
        await busy
        with pytest.raises(DeadlineExceeded):
            await hasty

    harness = scenario(play)
    assert harness.fake.batches == [[b"0"]]
    assert harness.count("isthmus_cloud_expired_work_total", stage="queue") == 1


def test_the_input_of_a_cancelled_caller_leaves_the_queue() -> None:
    async def play(harness: WorkerHarness) -> None:
        harness.fake.gate.clear()
        busy = harness.ask(b"0")
        await asyncio.sleep(0.02)
        gone = harness.ask(b"1")
        await queued(harness, 1)
        gone.cancel()
        await queued(harness, 0)
        harness.fake.gate.set()
        await busy

    assert scenario(play).fake.batches == [[b"0"]]


def test_draining_refuses_new_inputs_and_answers_queued_ones() -> None:
    async def play(harness: WorkerHarness) -> None:
        harness.fake.gate.clear()
        busy = harness.ask(b"0")
        await asyncio.sleep(0.02)
        old = harness.ask(b"\xff")
        await queued(harness, 1)
        harness.worker.drain()
        with pytest.raises(Draining):
            await harness.ask(b"2")
        harness.fake.gate.set()
        await busy
        assert (await old).probabilities == ((1.0, 0.0),)

    scenario(play)


def test_a_payload_that_the_bundle_cannot_have_written_is_refused_before_it_is_queued() -> None:
    async def play(harness: WorkerHarness) -> None:
        with pytest.raises(PayloadTooLarge):
            await harness.ask(bytes(9))

    assert scenario(play).fake.batches == []


def test_an_unknown_bundle_is_an_error_that_lists_the_bundles() -> None:
    async def play(harness: WorkerHarness) -> None:
        request = CloudRequest(1, bytes(8), 1.0, Payload(Codec.BOTTLENECK, 0, 0, b"1"))
        with pytest.raises(UnknownBundle, match=f"{bytes(8).hex()}.*{FINGERPRINT[:8].hex()}"):
            await harness.worker.submit(request)

    scenario(play)


def test_peers_take_turns() -> None:
    async def play(harness: WorkerHarness) -> None:
        harness.fake.gate.clear()
        busy = harness.ask(b"0", peer="greedy")
        await asyncio.sleep(0.02)
        rest = [harness.ask(bytes([value]), peer="greedy") for value in range(1, 7)]
        rest += [harness.ask(b"a", peer="a"), harness.ask(b"b", peer="b"), harness.ask(b"c", peer="b")]
        await queued(harness, 9)
        harness.fake.gate.set()
        await asyncio.gather(busy, *rest)

    harness = scenario(play, queue_limit=9)
    assert harness.fake.batches == [[b"0"], [b"\1", b"a", b"b", b"c"], [b"\2", b"\3", b"\4", b"\5"], [b"\6"]]


def test_a_full_queue_refuses_the_peer_with_the_most_waiting() -> None:
    async def play(harness: WorkerHarness) -> None:
        harness.fake.gate.clear()
        busy = harness.ask(b"0")
        await asyncio.sleep(0.02)
        greedy = [harness.ask(b"1", 10.0 - value, peer="greedy") for value in range(4)]
        await queued(harness, 4)
        other = harness.ask(b"\xff", peer="other")
        with pytest.raises(Overloaded):
            await greedy[3]
        with pytest.raises(Overloaded):
            await harness.ask(b"1", peer="greedy")
        harness.fake.gate.set()
        assert (await other).probabilities == ((1.0, 0.0),)
        await asyncio.gather(busy, *greedy[:3])

    assert scenario(play).count("isthmus_cloud_requests_rejected_total", reason="queue") == 2


def test_an_input_that_would_wait_too_long_is_refused_with_a_hint() -> None:
    async def play(harness: WorkerHarness) -> None:
        harness.times.each_s = 0.2
        harness.fake.gate.clear()
        waiting = [harness.ask(b"1")]
        await asyncio.sleep(0.02)
        waiting += [harness.ask(b"1") for _ in range(2)]
        await queued(harness, 2)
        with pytest.raises(Overloaded, match=r"the inputs before this one take \d+ ms, try again in \d+ ms") as refused:
            await harness.ask(b"2", budget_s=0.5)
        assert 0.4 <= refused.value.retry_s <= 0.6
        harness.fake.gate.set()
        await asyncio.gather(*waiting)

    harness = scenario(play)
    assert harness.count("isthmus_cloud_requests_rejected_total", reason="queue") == 1
    assert [data for batch in harness.fake.batches for data in batch] == [b"1"] * 3


def test_what_cannot_be_computed_in_time_is_dropped() -> None:
    async def play(harness: WorkerHarness) -> None:
        harness.fake.gate.clear()
        busy = harness.ask(b"0")
        await asyncio.sleep(0.02)
        hasty, other = harness.ask(b"1", budget_s=5.0), harness.ask(b"2", budget_s=100.0)
        await queued(harness, 2)
        harness.times.each_s = 20.0
        harness.fake.gate.set()
        with pytest.raises(DeadlineExceeded):
            await hasty
        await asyncio.gather(busy, other)

    harness = scenario(play)
    assert harness.fake.batches == [[b"0"], [b"2"]]
    assert harness.count("isthmus_cloud_expired_work_total", stage="queue") == 1


def test_an_idle_service_tries_an_input_that_seems_to_be_too_late() -> None:
    async def play(harness: WorkerHarness) -> None:
        harness.worker._times = times = ComputeTimes()
        for _ in range(40):
            times.observe(0, 1, 60.0)
        for _ in range(4):
            await harness.ask(b"1", budget_s=1.0)
        assert times.predict(0, 1) < 1.0

    scenario(play)


def test_turns_of_a_bounded_number_of_peers_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("isthmus.cloud_service.vision.batching.MAX_PEERS", 2)

    async def play(harness: WorkerHarness) -> None:
        for peer in ("a", "b", "a", "c"):
            await harness.ask(b"1", peer=peer)
        assert list(harness.worker._served) == ["a", "c"]

    scenario(play)


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


def test_an_image_that_is_decoded_keeps_nobody_waiting() -> None:
    async def play(harness: WorkerHarness) -> None:
        harness.decoder.gate.clear()
        image = harness.ask(b"\x33", codec=Codec.IMAGE)
        await until(lambda: harness.decoder.decoded == [b"\x33"])
        assert (await harness.ask(b"\xff")).probabilities == ((1.0, 0.0),)
        harness.decoder.gate.set()
        assert (await image).probabilities == ((0.2, 0.0),)

    harness = scenario(play)
    assert harness.decoder.closed == 1


@pytest.mark.parametrize(
    ("failure", "kind"), [(InvalidInput("broken"), InvalidInput), (KeyError("a bug"), ServiceError)]
)
def test_an_image_that_cannot_be_decoded_is_refused_alone(failure: Exception, kind: type[IsthmusError]) -> None:
    async def play(harness: WorkerHarness) -> None:
        harness.decoder.failures[b"bad"] = failure
        bad, good = (harness.ask(data, codec=Codec.IMAGE) for data in (b"bad", b"\xff"))
        with pytest.raises(kind):
            await bad
        assert (await good).probabilities == ((1.0, 0.0),)

    harness = scenario(play)
    assert harness.fake.batches == [[b"\xff"]]
    assert harness.decoder.starts >= 2  # before each image, for one that was killed


def test_images_are_decoded_no_more_than_a_batch_ahead_and_in_turn() -> None:
    async def play(harness: WorkerHarness) -> None:
        harness.fake.gate.clear()
        busy = harness.ask(b"0")
        await asyncio.sleep(0.02)
        images = [harness.ask(b"1", codec=Codec.IMAGE, peer="greedy") for _ in range(6)]
        images.append(harness.ask(b"2", codec=Codec.IMAGE, peer="other"))
        await until(lambda: len(harness.decoder.decoded) >= 4)
        await asyncio.sleep(0.02)
        assert harness.decoder.decoded == [b"1", b"2", b"1", b"1"]
        harness.fake.gate.set()
        await asyncio.gather(busy, *images)

    harness = scenario(play, queue_limit=8)
    assert harness.fake.batches == [[b"0"], [b"1", b"1", b"1", b"2"], [b"1"] * 3]


def test_the_image_of_a_cancelled_caller_is_not_computed() -> None:
    async def play(harness: WorkerHarness) -> None:
        harness.decoder.gate.clear()
        gone = harness.ask(b"1", codec=Codec.IMAGE)
        await until(lambda: harness.decoder.decoded == [b"1"])
        gone.cancel()
        await queued(harness, 0)
        harness.decoder.gate.set()
        await harness.ask(b"2")

    assert scenario(play).fake.batches == [[b"2"]]


def test_an_expired_image_is_never_decoded() -> None:
    async def play(harness: WorkerHarness) -> None:
        harness.decoder.gate.clear()
        busy = harness.ask(b"1", codec=Codec.IMAGE)
        await until(lambda: harness.decoder.decoded == [b"1"])
        hasty = harness.ask(b"2", budget_s=0.01, codec=Codec.IMAGE)
        await asyncio.sleep(0.03)
        harness.decoder.gate.set()
        await busy
        with pytest.raises(DeadlineExceeded):
            await hasty

    harness = scenario(play)
    assert harness.decoder.decoded == [b"1"]
    assert harness.count("isthmus_cloud_expired_work_total", stage="queue") == 1


def test_a_process_that_cannot_be_started_is_logged_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(worker, "RESTART_S", 0.0)

    async def play(harness: WorkerHarness) -> None:
        harness.decoder.failed_starts = 5
        assert (await harness.ask(b"a", codec=Codec.IMAGE)).probabilities
        while harness.decoder.failed_starts:
            await harness.ask(b"a", codec=Codec.IMAGE)

    scenario(play)
    assert [record.message for record in caplog.records] == ["no process to decode images"]
