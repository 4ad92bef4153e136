"""Owns the processor: a bounded queue, one compute thread, batches as `batching` plans them.

Everything here but `_compute` runs on the event loop's thread, so the queue needs no lock.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from isthmus.cloud_service.metrics import CloudMetrics
from isthmus.cloud_service.vision.batching import BatchLimits, QueuedInput, next_batch
from isthmus.cloud_service.vision.predictor import Kind, Predictor, Probabilities
from isthmus.models.errors import DeadlineExceeded, Draining, IsthmusError, Overloaded, ServiceError, UnknownBundle
from isthmus.models.messages import CloudReply, CloudRequest, Codec
from isthmus.protos.limits import BUNDLE_ID_BYTES

MAX_WAITING_BYTES = 128 << 20  # thirty of the largest photos: a queue is bounded in bytes too


@dataclass
class Waiting:
    """A queued input and whoever waits for its answer."""

    work: QueuedInput
    request: CloudRequest
    answer: asyncio.Future[CloudReply]


class Worker:
    """Accepts inputs until drained, answers each exactly once."""

    def __init__(
        self, answerers: Mapping[bytes, Predictor], limits: BatchLimits, queue_limit: int, metrics: CloudMetrics
    ) -> None:
        """`answerers` by whole fingerprint; requests name the first 8 bytes of it."""
        self._answerers = {fingerprint[:BUNDLE_ID_BYTES]: answerer for fingerprint, answerer in answerers.items()}
        self._limits = limits
        self._queue_limit = queue_limit
        self._metrics = metrics
        self._waiting: dict[int, Waiting] = {}  # in order of arrival
        self._tickets = itertools.count()
        self._changed = asyncio.Event()
        self._draining = False
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tail")

    async def submit(self, request: CloudRequest) -> CloudReply:
        """Queue one input and wait for its answer.

        Raises UnknownBundle, Overloaded (queue full), Draining, DeadlineExceeded, or what decoding and tail raise;
        what the bundle cannot have written or cannot answer is refused before it is queued.
        """
        if request.fingerprint not in self._answerers:
            held = ", ".join(sorted(key.hex() for key in self._answerers))
            raise UnknownBundle(f"bundle {request.fingerprint.hex()} is not held here, there are {held}")
        if self._draining:
            self._metrics.rejected("draining")
            raise Draining("the service is shutting down")
        self._answerers[request.fingerprint].check(request)
        waiting_bytes = sum(len(waiting.request.payload.data) for waiting in self._waiting.values())
        if len(self._waiting) >= self._queue_limit or waiting_bytes > MAX_WAITING_BYTES:
            self._metrics.rejected("queue")
            raise Overloaded(f"{len(self._waiting)} inputs of {waiting_bytes} bytes are waiting already")
        now_s = time.monotonic()
        key = (request.fingerprint, kind_of(request))
        work = QueuedInput(next(self._tickets), key, now_s, now_s + request.budget_s)
        waiting = Waiting(work, request, asyncio.get_running_loop().create_future())
        self._waiting[work.ticket] = waiting
        self._metrics.queue_depth(len(self._waiting))
        self._changed.set()
        try:
            return await waiting.answer
        finally:  # a caller that has gone takes its input along
            self._waiting.pop(work.ticket, None)

    async def run(self) -> None:
        """Compute batches until drained and empty."""
        while self._waiting or not self._draining:
            queue = [waiting.work for waiting in self._waiting.values()]
            plan = next_batch(queue, time.monotonic(), self._limits)
            for work in plan.expired:
                self._metrics.expired("queue")
                self._finish(self._waiting.pop(work.ticket), DeadlineExceeded("expired before it was computed"))
            if plan.batch:
                await self._compute([self._waiting.pop(work.ticket) for work in plan.batch])
            elif self._waiting or not self._draining:
                await self._arrival(plan.wait_s)
            self._metrics.queue_depth(len(self._waiting))
        self._thread.shutdown()

    def drain(self) -> None:
        """Take no new work; `run` returns when the queue is empty."""
        self._draining = True
        self._changed.set()

    async def _arrival(self, wait_s: float | None) -> None:
        self._changed.clear()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._changed.wait(), wait_s)

    async def _compute(self, batch: list[Waiting]) -> None:
        answerer, kind = self._answerers[batch[0].request.fingerprint], kind_of(batch[0].request)
        started_s = time.monotonic()
        payloads = [waiting.request.payload for waiting in batch]
        loop = asyncio.get_running_loop()
        results: list[Probabilities | IsthmusError]
        try:
            results = list(await loop.run_in_executor(self._thread, answerer.answer, kind, payloads))
        except Exception:  # whatever went wrong, every caller gets an answer and the worker lives on
            self._metrics.log_failure("batch failed")
            results = [ServiceError("the batch failed") for _ in batch]
        ended_s = time.monotonic()
        queued_s = [started_s - waiting.work.arrived_s for waiting in batch]
        self._metrics.batch(answerer.info.name, queued_s, ended_s - started_s)
        self._metrics.computed(answerer.info, kind.tap, kind.tasks, len(batch))
        for waiting, waited_s, result in zip(batch, queued_s, results, strict=True):
            if isinstance(result, IsthmusError):
                self._finish(waiting, result)
            else:
                if waiting.work.deadline_s <= ended_s:
                    self._metrics.expired("compute")
                self._finish(waiting, CloudReply(result, waited_s, ended_s - started_s))

    def _finish(self, waiting: Waiting, result: CloudReply | IsthmusError) -> None:
        if waiting.answer.done():
            return
        if isinstance(result, IsthmusError):
            waiting.answer.set_exception(result)
        else:
            waiting.answer.set_result(result)


def kind_of(request: CloudRequest) -> Kind:
    payload = request.payload
    return Kind(payload.tap if payload.codec is Codec.BOTTLENECK else None, request.tasks)
