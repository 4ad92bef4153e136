"""One of the processes that compute photos for a `Forwarder`: a worker, and what it counts. Knows nothing about Ray."""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import Sequence
from functools import partial

import torch
from prometheus_client import CollectorRegistry

from isthmus.cloud_service.config import CloudConfig
from isthmus.cloud_service.metrics import CloudMetrics
from isthmus.cloud_service.vision import service
from isthmus.cloud_service.vision.forwarder import Event, ReplicaAnswer
from isthmus.models.errors import IsthmusError
from isthmus.models.messages import BundleInfo, CloudReply, CloudRequest
from isthmus.models.torch_device import open_device


class RecordedMetrics(CloudMetrics):
    """Metrics of a replica: what is counted leaves with its next answer, for the metrics of the service."""

    def __init__(self, events: list[Event], registry: CollectorRegistry, bundles: Sequence[BundleInfo]) -> None:
        """`events`: where each is added."""
        super().__init__(registry, bundles)
        self._events = events

    def batch(self, model: str, queued_s: Sequence[float], compute_s: float) -> None:
        self._events.append(("batch", (model, queued_s, compute_s)))

    def computed(self, bundle: BundleInfo, tap: int | None, tasks: Sequence[int], count: int) -> None:
        self._events.append(("computed", (bundle, tap, tasks, count)))

    def rejected(self, reason: str) -> None:
        self._events.append(("rejected", (reason,)))

    def expired(self, stage: str) -> None:
        self._events.append(("expired", (stage,)))

    def log_failure(self, what: str) -> None:
        self._events.append(("log_failure", (f"{what}, in a replica\n{traceback.format_exc()}",)))


class Replica:
    """Answers what is forwarded to it, as long as its process lives."""

    def __init__(self, config: CloudConfig) -> None:
        """Needs a running event loop. Raises BundleError."""
        torch.set_num_threads(max(config.threads, 1))
        self._events: list[Event] = []
        count = partial(RecordedMetrics, self._events)
        self._worker = service.load(config, CollectorRegistry(), open_device(config.device), count)
        self._running = asyncio.create_task(self._worker.run())

    async def predict(self, requests: Sequence[tuple[CloudRequest, str]]) -> Sequence[ReplicaAnswer]:
        """For each request with its peer the reply, or the error that is its answer."""
        return await asyncio.gather(*(self._answer(request, peer) for request, peer in requests))

    async def _answer(self, request: CloudRequest, peer: str) -> ReplicaAnswer:
        outcome: CloudReply | IsthmusError
        try:
            outcome = await self._worker.submit(request, peer)
        except IsthmusError as error:
            outcome = error.with_traceback(None)
            outcome.__cause__ = outcome.__context__ = None
        events = tuple(self._events)
        self._events.clear()
        return ReplicaAnswer(outcome, events)

    def check_health(self) -> None:
        """Raises RuntimeError when nothing is computed any more: this process must be replaced."""
        if self._running.done():
            raise RuntimeError("the worker has ended")
