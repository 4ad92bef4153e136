"""A replica in this process: a real worker over a small bundle."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import Awaitable, Callable

import numpy as np
import pytest
import torch

from isthmus.cloud_service.config import CloudConfig
from isthmus.cloud_service.vision.forwarder import ReplicaAnswer
from isthmus.cloud_service.vision.predictor import Predictor
from isthmus.cloud_service.vision.replica import Replica
from isthmus.models.errors import Overloaded, ServiceError, UnknownBundle
from isthmus.models.messages import CloudReply, CloudRequest, Codec, Payload
from isthmus.models.vision.bundle import Bundle


@pytest.fixture(autouse=True)
def threads_as_before() -> object:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def play(bundle: Bundle, scene: Callable[[Replica], Awaitable[None]]) -> None:
    async def run() -> None:
        replica = Replica(CloudConfig(bundles=(bundle.folder,)))
        await scene(replica)
        replica._worker.drain()
        await replica._running

    asyncio.run(asyncio.wait_for(run(), 30))


def request(bundle: Bundle) -> CloudRequest:
    codec = bundle.codec(0)
    payload = Payload(Codec.BOTTLENECK, 0, 0, codec.encode(np.zeros(codec.shape_CHW, np.int32), 0))
    return CloudRequest(1, bundle.fingerprint[:8], 10.0, payload)


async def predict(replica: Replica, request: CloudRequest) -> ReplicaAnswer:
    (answer,) = await replica.predict([(request, "peer")])
    return answer


def crossed(answer: ReplicaAnswer) -> ReplicaAnswer:
    """As it arrives in another process."""
    return pickle.loads(pickle.dumps(answer))  # type: ignore[no-any-return]


def test_it_answers_with_one_thread_and_tells_what_it_counted_once(tiny_bundle: Bundle) -> None:
    async def scene(replica: Replica) -> None:
        answer = crossed(await predict(replica, request(tiny_bundle)))
        assert isinstance(answer.outcome, CloudReply)
        assert len(answer.outcome.probabilities[0]) == 2
        assert [name for name, _ in answer.events] == ["batch", "computed"]
        unknown = CloudRequest(2, bytes(8), 10.0, request(tiny_bundle).payload)
        assert (await predict(replica, unknown)).events == ()
        assert torch.get_num_threads() == 1
        replica.check_health()

    play(tiny_bundle, scene)


def test_errors_are_answers_that_cross_processes(tiny_bundle: Bundle) -> None:
    async def scene(replica: Replica) -> None:
        unknown = CloudRequest(2, bytes(8), 10.0, request(tiny_bundle).payload)
        answer = crossed(await predict(replica, unknown))
        assert isinstance(answer.outcome, UnknownBundle)
        assert answer.outcome.__traceback__ is None

    play(tiny_bundle, scene)
    refused = crossed(ReplicaAnswer(Overloaded("many wait", 1.5))).outcome
    assert isinstance(refused, Overloaded)
    assert (str(refused), refused.retry_s) == ("many wait", 1.5)


def test_a_fault_is_told_with_its_traceback(tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object) -> None:
        raise ValueError("a fault of ours")

    async def scene(replica: Replica) -> None:
        monkeypatch.setattr(Predictor, "predict", broken)
        answer = await predict(replica, request(tiny_bundle))
        assert isinstance(answer.outcome, ServiceError)
        [told] = [arguments[0] for name, arguments in answer.events if name == "log_failure"]
        assert told.startswith("batch failed, in a replica\nTraceback")
        assert "a fault of ours" in told

    play(tiny_bundle, scene)


def test_one_whose_worker_has_ended_is_not_healthy(tiny_bundle: Bundle) -> None:
    async def scene(replica: Replica) -> None:
        replica._worker.drain()
        await replica._running
        with pytest.raises(RuntimeError, match="has ended"):
            replica.check_health()

    play(tiny_bundle, scene)
