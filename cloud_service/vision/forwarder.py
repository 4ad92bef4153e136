"""Forwards requests for photos to replicas, in place of a worker in this process. Knows nothing about Ray.

    request -> a replica's worker: queue, batch -> reply
            -> it ended before it replied -> another replica, while there is time

A request may be computed twice, which changes nothing; it is answered once.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge

from isthmus.cloud_service.metrics import CloudMetrics
from isthmus.models.errors import DeadlineExceeded, IsthmusError, ServiceError
from isthmus.models.messages import BundleInfo, CloudReply, CloudRequest

ATTEMPTS = 4  # for one request: should it be what ends replicas, it ends no more of them
PAUSE_S = 0.05  # before the second attempt, and twice that before the third: a dead replica is soon known as such
COUNT_S = 1.0  # between looks at how many replicas run

Event = tuple[str, tuple[Any, ...]]  # a method of CloudMetrics, and its arguments

log = logging.getLogger("isthmus.cloud")


@dataclass(frozen=True, slots=True)
class ReplicaAnswer:
    """What became of a request, and what the replica has counted since its last answer."""

    outcome: CloudReply | IsthmusError
    events: Sequence[Event] = ()


class ReplicaLost(Exception):
    """The replica ended, or cannot be reached, before it answered."""


class Replicas(Protocol):
    """Processes that compute, any of which may end at any time."""

    async def ask(self, request: CloudRequest, peer: str, alone: bool) -> ReplicaAnswer:
        """`alone`: should it be what ends replicas, no other request is lost with it.

        Raises ReplicaLost, or Overloaded or ServiceError where none takes the request.
        """
        ...

    def count(self) -> int:
        """How many run. Raises ServiceError when that can no longer be known: no request is answered any more."""
        ...


class Forwarder:
    """Answers each request exactly once, by any of the replicas."""

    def __init__(self, bundles: Sequence[BundleInfo], replicas: Replicas, registry: CollectorRegistry) -> None:
        self.bundles = tuple(bundles)
        self.metrics = CloudMetrics(registry, bundles)
        running = "Replicas that compute photos, or are about to."
        self._running = Gauge("isthmus_cloud_replicas", running, registry=registry)
        again = "Inputs that were sent to another replica because theirs ended before it replied."
        self._again = Counter("isthmus_cloud_resent_inputs", again, registry=registry)
        self._replicas = replicas
        self._waiting = 0
        self._draining = asyncio.Event()

    async def submit(self, request: CloudRequest, peer: str = "") -> CloudReply:
        """Have one input computed within its time.

        Raises DeadlineExceeded, Overloaded, ServiceError when several replicas ended over it, or what the worker of a
        replica raises.
        """
        self._wait(1)
        try:
            async with asyncio.timeout(request.budget_s) as timeout:
                answer = await self._ask(request, peer, timeout.when() or 0.0)
        except TimeoutError:
            self.metrics.expired("queue")
            raise DeadlineExceeded("no replica answered in time") from None
        finally:
            self._wait(-1)
        for name, arguments in answer.events:
            getattr(self.metrics, name)(*arguments)
        if isinstance(answer.outcome, IsthmusError):
            raise answer.outcome
        return answer.outcome

    async def run(self) -> None:
        """Watch the replicas until drained. Raises ServiceError when they cannot be reached any more."""
        known = -1
        while not self._draining.is_set():
            if (count := self._replicas.count()) != known:
                log.info("%d replicas compute photos", count)
                self._running.set(known := count)
            try:
                await asyncio.wait_for(self._draining.wait(), COUNT_S)
            except TimeoutError:
                continue

    def drain(self) -> None:
        """End `run`. Whoever waits is answered all the same."""
        self._draining.set()

    async def _ask(self, request: CloudRequest, peer: str, deadline_s: float) -> ReplicaAnswer:
        clock = asyncio.get_running_loop().time
        for attempt in range(ATTEMPTS):
            if attempt:
                self._again.inc()
                await asyncio.sleep(attempt * PAUSE_S)
            try:
                due = replace(request, budget_s=deadline_s - clock())
                return await self._replicas.ask(due, peer, alone=attempt > 0)
            except ReplicaLost:
                continue
        raise ServiceError(f"{ATTEMPTS} replicas ended before they answered this input")

    def _wait(self, change: int) -> None:
        self._waiting += change
        self.metrics.queue_depth(self._waiting)
