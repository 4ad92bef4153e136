"""What the service does with replicas that answer, refuse, end and hang; they are scripted, and Ray is not needed."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from isthmus.cloud_service.vision import forwarder
from isthmus.cloud_service.vision.forwarder import ATTEMPTS, Event, Forwarder, ReplicaAnswer, ReplicaLost
from isthmus.models.errors import DeadlineExceeded, Overloaded, PayloadCorrupt, ServiceError
from isthmus.models.messages import BundleInfo, CloudReply, CloudRequest, Codec, Payload, TapInfo, TaskInfo

INFO = BundleInfo(bytes(range(32)), "fake", (TaskInfo("defect", 2),), (TapInfo("light", 1),))
REQUEST = CloudRequest(7, INFO.fingerprint[:8], 5.0, Payload(Codec.BOTTLENECK, 0, 0, b"payload"))
REPLY = CloudReply(((0.25, 0.75),), 0.001, 0.002)

Step = ReplicaAnswer | Exception | Callable[[], Awaitable[ReplicaAnswer]]


class ScriptedReplicas:
    """Answers each question by the next step of a script."""

    def __init__(self, *script: Step) -> None:
        self.script = list(script)
        self.asked: list[tuple[CloudRequest, str]] = []
        self.alone: list[bool] = []
        self.counts: list[int | ServiceError] = [2]

    async def ask(self, request: CloudRequest, peer: str, alone: bool) -> ReplicaAnswer:
        self.asked.append((request, peer))
        self.alone.append(alone)
        step = self.script.pop(0)
        if isinstance(step, Exception):
            raise step
        return step if isinstance(step, ReplicaAnswer) else await step()

    def count(self) -> int:
        count = self.counts.pop(0) if len(self.counts) > 1 else self.counts[0]
        if isinstance(count, ServiceError):
            raise count
        return count


async def never() -> ReplicaAnswer:
    await asyncio.Event().wait()
    raise AssertionError


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forwarder, "PAUSE_S", 0.0)
    monkeypatch.setattr(forwarder, "COUNT_S", 0.001)


class Door:
    """A forwarder with its metrics."""

    def __init__(self, *script: Step) -> None:
        self.replicas, self.registry = ScriptedReplicas(*script), CollectorRegistry()
        self.forwarder = Forwarder([INFO], self.replicas, self.registry)

    def submit(self, request: CloudRequest = REQUEST) -> CloudReply:
        return within_seconds(self.forwarder.submit(request, "peer"))

    def sample(self, name: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(f"isthmus_cloud_{name}", labels)


def within_seconds(play: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(play, 10))


def answered(*events: Event) -> ReplicaAnswer:
    return ReplicaAnswer(REPLY, events)


def test_a_request_goes_to_a_replica_with_its_peer_and_the_time_that_is_left() -> None:
    door = Door(answered())
    assert door.submit() == REPLY
    [(request, peer)] = door.replicas.asked
    assert (request.payload, request.fingerprint, peer) == (REQUEST.payload, REQUEST.fingerprint, "peer")
    assert 0 < request.budget_s <= REQUEST.budget_s
    assert door.forwarder.bundles == (INFO,)


def test_an_error_of_the_worker_is_the_answer_and_is_not_asked_again() -> None:
    door = Door(ReplicaAnswer(PayloadCorrupt("bad")))
    with pytest.raises(PayloadCorrupt, match="bad"):
        door.submit()
    assert len(door.replicas.asked) == 1


def test_a_refusal_keeps_its_hint() -> None:
    with pytest.raises(Overloaded) as refused:
        Door(ReplicaAnswer(Overloaded("many wait", 1.5))).submit()
    assert refused.value.retry_s == 1.5


def test_a_replica_that_ends_costs_another_attempt_and_nothing_else() -> None:
    door = Door(ReplicaLost("killed"), ReplicaLost("killed"), answered())
    assert door.submit() == REPLY
    budgets = [request.budget_s for request, _ in door.replicas.asked]
    assert budgets == sorted(budgets, reverse=True)
    assert len(budgets) == 3
    assert door.replicas.alone == [False, True, True]  # the others of its group are not lost with it again
    assert door.sample("resent_inputs_total") == 2


def test_an_input_over_which_replicas_end_is_given_up() -> None:
    door = Door(*[ReplicaLost("killed")] * 10)
    with pytest.raises(ServiceError, match=f"{ATTEMPTS} replicas ended before they answered this input"):
        door.submit()
    assert len(door.replicas.asked) == ATTEMPTS


@pytest.mark.parametrize("script", [(never,), (ReplicaLost("killed"), never)])
def test_without_an_answer_in_time_the_deadline_is_the_answer(script: Sequence[Step]) -> None:
    door = Door(*script)
    late = CloudRequest(7, REQUEST.fingerprint, 0.02, REQUEST.payload)
    with pytest.raises(DeadlineExceeded, match="no replica answered in time"):
        door.submit(late)
    assert door.sample("expired_work_total", stage="queue") == 1
    assert door.sample("queue_depth") == 0


def test_what_a_replica_counts_is_in_the_metrics_of_the_service(caplog: pytest.LogCaptureFixture) -> None:
    events: list[Event] = [
        ("batch", ("fake", (0.1, 0.2), 0.5)),
        ("computed", (INFO, 0, (0,), 2)),
        ("expired", ("compute",)),
        ("rejected", ("queue",)),
        ("log_failure", ("the batch failed, in a replica\nTraceback",)),
    ]
    door = Door(answered(*events))
    door.submit()
    assert door.sample("batch_size_sum", model="fake") == 2
    assert door.sample("queue_wait_seconds_sum", model="fake") == pytest.approx(0.3)
    assert door.sample("inputs_total", model="fake", tap="light") == 2
    assert door.sample("expired_work_total", stage="compute") == 1
    assert door.sample("requests_rejected_total", reason="queue") == 1
    assert "the batch failed, in a replica" in caplog.text


def test_inputs_that_wait_for_replicas_are_the_depth_of_the_queue() -> None:
    async def play() -> None:
        door, gate = Door(), asyncio.Event()

        async def held() -> ReplicaAnswer:
            await gate.wait()
            return answered()

        door.replicas.script = [held, held]
        waiting = [asyncio.create_task(door.forwarder.submit(REQUEST)) for _ in range(2)]
        await asyncio.sleep(0)
        assert door.sample("queue_depth") == 2
        gate.set()
        assert await asyncio.gather(*waiting) == [REPLY, REPLY]
        assert door.sample("queue_depth") == 0

    within_seconds(play())


def test_how_many_replicas_run_is_logged_when_it_changes_and_exported(caplog: pytest.LogCaptureFixture) -> None:
    async def play() -> None:
        door = Door()
        door.replicas.counts = [2, 2, 1, 1, 2, 2]
        running = asyncio.create_task(door.forwarder.run())
        while len(door.replicas.counts) > 1:
            await asyncio.sleep(0.001)
        assert door.sample("replicas") == 2
        door.forwarder.drain()
        await running

    with caplog.at_level(logging.INFO, "isthmus.cloud"):
        within_seconds(play())
    assert [message[0] for message in caplog.messages] == ["2", "1", "2"]


def test_a_cluster_that_has_ended_ends_the_service() -> None:
    door = Door()
    door.replicas.counts = [2, ServiceError("Ray has not answered for 30 s")]
    with pytest.raises(ServiceError, match="has not answered"):
        within_seconds(door.forwarder.run())
