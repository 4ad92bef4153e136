"""Ray's errors, translated. Without Ray this is skipped; `tests/acceptance/test_ray.py` has the real thing."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

pytest.importorskip("ray")

from ray.exceptions import ActorDiedError, ActorUnavailableError, RayTaskError, TaskCancelledError
from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError

from isthmus.cloud_service.config import CloudConfig, RayConfig
from isthmus.cloud_service.vision import ray_serve
from isthmus.cloud_service.vision.forwarder import ReplicaAnswer, ReplicaLost
from isthmus.cloud_service.vision.ray_serve import CALLS, RayReplicas, deployment
from isthmus.models.errors import Overloaded, ServiceError
from isthmus.models.messages import CloudReply, CloudRequest, Codec, Payload

REQUEST = CloudRequest(7, bytes(8), 5.0, Payload(Codec.BOTTLENECK, 0, 0, b"payload"))
ANSWER = ReplicaAnswer(CloudReply(((0.25, 0.75),), 0.001, 0.002))


class FakeHandle:
    """A handle of Serve whose call comes to `outcome` for each request; None: to nothing."""

    def __init__(self, outcome: Any) -> None:
        self.outcome, self.cancelled, self.calls = outcome, False, list[int]()
        self.predict = self

    def remote(self, requests: Sequence[tuple[CloudRequest, str]]) -> FakeHandle:
        self.calls.append(len(requests))
        return self

    def cancel(self) -> None:
        self.cancelled = True

    def __await__(self) -> Any:
        return self._result().__await__()

    async def _result(self) -> Any:
        if self.outcome is None:
            await asyncio.Event().wait()
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return [self.outcome] * self.calls[-1]


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RayReplicas, "_keep_counting", lambda replicas: None)


def ask(outcome: Any) -> ReplicaAnswer:
    return asyncio.run(RayReplicas(FakeHandle(outcome), 2).ask(REQUEST, "peer", alone=False))


def test_an_answer_is_passed_on() -> None:
    assert ask(ANSWER) is ANSWER


@pytest.mark.parametrize(
    ("error", "translated"),
    [
        (ActorDiedError(), ReplicaLost),
        (ActorUnavailableError("unreachable", None), ReplicaLost),
        (ReplicaUnavailableError("one"), ReplicaLost),
        (TaskCancelledError(), ReplicaLost),
        (BackPressureError(3, 2), Overloaded),
        (DeploymentUnavailableError(DeploymentID("photos", "isthmus")), ServiceError),
        (RayTaskError("predict", "Traceback", ValueError("a fault of ours")), ServiceError),
    ],
)
def test_errors_of_ray_are_translated(error: Exception, translated: type[Exception]) -> None:
    with pytest.raises(translated) as raised:
        ask(error)
    assert type(raised.value) is translated
    assert "Traceback" not in str(raised.value) or translated is ReplicaLost


@pytest.mark.parametrize("alone", [True, False])
def test_a_device_that_leaves_is_not_waited_for(alone: bool) -> None:
    async def play() -> None:
        handle = FakeHandle(None)
        asking = asyncio.create_task(RayReplicas(handle, 2).ask(REQUEST, "peer", alone))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        assert handle.cancelled is alone  # others may share the call

    asyncio.run(play())


def test_many_requests_share_calls_and_a_suspect_has_its_own() -> None:
    async def play() -> None:
        handle = FakeHandle(None)
        replicas = RayReplicas(handle, 2)
        asking = [asyncio.create_task(replicas.ask(REQUEST, "peer", alone=False)) for _ in range(CALLS * 2 + 3)]
        await asyncio.sleep(0.01)
        assert handle.calls == [1] * CALLS * 2  # so many are enough at a time
        asking.append(asyncio.create_task(replicas.ask(REQUEST, "peer", alone=True)))
        await asyncio.sleep(0.01)
        assert handle.calls == [1] * (CALLS * 2 + 1)
        for task in asking:
            task.cancel()

    asyncio.run(play())


def test_without_a_count_for_long_the_cluster_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    replicas = RayReplicas(FakeHandle(None), 2)
    assert replicas.count() == 2
    monkeypatch.setattr(ray_serve, "SILENT_S", -1.0)
    with pytest.raises(ServiceError, match="Ray has not answered"):
        replicas.count()


def test_replicas_are_fixed_in_number_or_follow_the_queue() -> None:
    config = CloudConfig(queue_limit=100, threads=3)
    fixed = deployment(config, RayConfig(replicas=4), 3)
    assert (fixed.num_replicas, fixed.ray_actor_options["num_cpus"]) == (4, 3)
    assert (fixed.max_ongoing_requests, fixed.max_queued_requests) == (200, 100)
    scaled = deployment(config, RayConfig(replicas=1, max_replicas=5), 3)._deployment_config.autoscaling_config
    assert (scaled.min_replicas, scaled.max_replicas) == (1, 5)
    assert scaled.target_ongoing_requests == config.batch.max_size
