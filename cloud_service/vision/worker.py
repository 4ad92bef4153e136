"""A bounded queue of inputs, processes that decode its images, and one thread that computes what `batching` plans.

    bottleneck payload ----------------------> batch -> reply
    image -> pixels, one by one on a decoder -> batch -> reply

Everything here but `Predictor.predict` runs on the event loop's thread, so the queue needs no lock.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from isthmus.cloud_service.metrics import CloudMetrics
from isthmus.cloud_service.vision.batching import (
    BatchLimits,
    QueuedInput,
    least_entitled,
    most_wait_s,
    next_batch,
    note_turns,
    wait_s,
)
from isthmus.cloud_service.vision.compute_time import ComputeTimes
from isthmus.cloud_service.vision.decode_process import Pixels
from isthmus.cloud_service.vision.decoding import ImageDecoder
from isthmus.cloud_service.vision.predictor import Kind, Predictor, TaskAnswers
from isthmus.models.errors import DeadlineExceeded, Draining, IsthmusError, Overloaded, ServiceError, UnknownBundle
from isthmus.models.messages import CloudReply, CloudRequest, Codec, OutputTensor, Payload
from isthmus.protos.limits import BUNDLE_ID_BYTES

ONE = BatchLimits(1, 0.0)
DECODING = -1  # the key of decoding times
RESTART_S = 1.0  # between attempts to start a process
MAX_QUEUED_BYTES = 128 << 20  # thirty of the largest photos: the queue is bounded in bytes too


@dataclass
class PendingRequest:
    """A queued request and the future that its caller awaits."""

    queued: QueuedInput
    request: CloudRequest
    reply: asyncio.Future[CloudReply]
    given: Payload | Pixels | None  # for the predictor; None for an image that is not decoded yet
    decoding: bool = False


class Worker:
    """Accepts inputs until drained and answers each exactly once."""

    def __init__(
        self,
        predictors: Sequence[Predictor],
        decoders: Sequence[ImageDecoder],
        limits: BatchLimits,
        queue_limit: int,
        metrics: CloudMetrics,
    ) -> None:
        """`queue_limit`: inputs that may wait. Requests name a bundle by the first 8 bytes of its fingerprint."""
        self.bundles = tuple(predictor.info for predictor in predictors)
        self.metrics = metrics
        self._predictors = {predictor.info.fingerprint[:BUNDLE_ID_BYTES]: predictor for predictor in predictors}
        self._decoders = decoders
        self._limits = limits
        self._queue_limit = queue_limit
        self._pending: dict[int, PendingRequest] = {}  # by ticket, in order of arrival
        self._tickets = itertools.count()
        self._keys: dict[tuple[bytes, Kind], int] = {}  # a number for each: plans compare and hash it often
        self._times = ComputeTimes()
        self._served: dict[str, int] = {}  # whose turn it is: of `note_turns`
        self._decoded_for: dict[str, int] = {}  # the same for images
        self._busy_until_s = 0.0  # by the prediction
        self._changed = asyncio.Event()
        self._failing: set[ImageDecoder] = set()  # which do not start; that is logged once
        self._draining = False
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tail")

    async def submit(self, request: CloudRequest, peer: str = "") -> CloudReply:
        """Queue one input and wait for its reply. Peers take turns, and the one with the most waiting is refused first.

        Raises UnknownBundle, Overloaded (the queue is full, or too long for the input's time), Draining,
        DeadlineExceeded, or what decoding and tail raise. What the bundle cannot have written or cannot answer is
        refused before it is queued.
        """
        self._check(request)
        now_s = time.monotonic()
        key = self._keys.setdefault((request.fingerprint, kind_of(request)), len(self._keys))
        size = len(request.payload.data)
        queued = QueuedInput(next(self._tickets), key, now_s, now_s + request.budget_s, peer, size)
        self._make_room(queued)
        given = None if request.payload.codec is Codec.IMAGE else request.payload
        pending = PendingRequest(queued, request, asyncio.get_running_loop().create_future(), given)
        self._pending[queued.ticket] = pending
        self._report_depth()
        self._changed.set()
        try:
            return await pending.reply
        finally:  # a cancelled caller's input leaves the queue
            self._pending.pop(queued.ticket, None)

    async def run(self) -> None:
        """Decode and compute until drained and empty."""
        async with asyncio.TaskGroup() as group:
            lanes = [group.create_task(self._decode_images(decoder)) for decoder in self._decoders]
            await self._compute_batches()
            for lane in lanes:
                lane.cancel()
        self._thread.shutdown()

    async def _compute_batches(self) -> None:
        while self._pending or not self._draining:
            ready = self._queue(lambda pending: pending.given is not None)
            plan = next_batch(ready, time.monotonic(), self._limits, self._times.predict, self._served)
            self._expire(plan.expired)
            if plan.batch:
                self._changed.set()  # there is room for decoded images
                await self._compute([self._pending.pop(queued.ticket) for queued in plan.batch])
            elif self._pending or not self._draining:
                await self._arrival(plan.wait_s)
            self._report_depth()

    async def _decode_images(self, decoder: ImageDecoder) -> None:
        """Decode one image after another, until cancelled; no more than a batch ahead."""
        try:
            while True:
                await self._start(decoder)
                decoded = sum(isinstance(pending.given, np.ndarray) for pending in self._pending.values())
                waiting = self._queue(lambda pending: pending.given is None and not pending.decoding)
                if decoded >= self._limits.max_size or not waiting:
                    await self._arrival(None)
                    continue
                plan = next_batch(waiting, time.monotonic(), ONE, self._predict_decoded, self._decoded_for)
                self._expire(plan.expired)
                for queued in plan.batch:
                    await self._decode(decoder, self._pending[queued.ticket])
        finally:
            await decoder.close()

    async def _start(self, decoder: ImageDecoder) -> None:
        try:
            await decoder.start()
            self._failing.discard(decoder)
        except IsthmusError:
            if decoder not in self._failing:
                self.metrics.log_failure("no process to decode images")
            self._failing.add(decoder)
            await asyncio.sleep(RESTART_S)

    async def _decode(self, decoder: ImageDecoder, pending: PendingRequest) -> None:
        """Decode an image, and refuse it if that fails."""
        pending.decoding, started_s = True, time.monotonic()
        note_turns(self._decoded_for, [pending.queued])
        spec = self._predictors[pending.request.fingerprint].image_input
        try:
            pending.given = await decoder.decode(pending.request.payload.data, spec)
            self._times.observe(DECODING, 1, time.monotonic() - started_s)
        except IsthmusError as error:
            self._refuse(pending, error)
        except Exception:
            self.metrics.log_failure("decoding failed")
            self._refuse(pending, ServiceError("decoding failed"))
        self._changed.set()

    def _refuse(self, pending: PendingRequest, error: IsthmusError) -> None:
        self._pending.pop(pending.queued.ticket, None)
        resolve(pending, error)

    def _predict_decoded(self, key: Hashable, size: int) -> float:
        """Seconds of a batch and of decoding its images."""
        return size * self._times.predict(DECODING, 1) + self._times.predict(key, size)

    def _expire(self, expired: Sequence[QueuedInput]) -> None:
        for queued in expired:
            self.metrics.expired("queue")
            self._refuse(self._pending[queued.ticket], DeadlineExceeded("not enough time was left to compute it"))

    def drain(self) -> None:
        """Refuse new inputs; `run` returns when the queue is empty."""
        self._draining = True
        self._changed.set()

    def _check(self, request: CloudRequest) -> None:
        if request.fingerprint not in self._predictors:
            held = ", ".join(sorted(key.hex() for key in self._predictors))
            raise UnknownBundle(f"bundle {request.fingerprint.hex()} is not held here, there are {held}")
        if self._draining:
            self.metrics.rejected("draining")
            raise Draining("the service is shutting down")
        self._predictors[request.fingerprint].check(request)

    def _queue(self, chosen: Callable[[PendingRequest], bool] = lambda pending: True) -> list[QueuedInput]:
        return [pending.queued for pending in self._pending.values() if chosen(pending)]

    def _make_room(self, new: QueuedInput) -> None:
        """Raises Overloaded unless `new` can be queued and computed in time; may refuse an input of another peer."""
        queue = self._queue()
        busy_s = max(self._busy_until_s - new.arrived_s, 0.0)
        waits_s = busy_s + wait_s(queue, new.peer, self._limits, self._times.predict)
        if waits_s > most_wait_s(new.deadline_s - new.arrived_s, new.key, self._times.predict):
            raise self._overloaded(f"the inputs before this one take {1000 * waits_s:.0f} ms", waits_s)
        while (long := len(queue) >= self._queue_limit) or queued_bytes(queue) > MAX_QUEUED_BYTES:
            loser = least_entitled(queue, new, by_bytes=not long)
            error = self._overloaded(f"{len(queue)} inputs of {queued_bytes(queue)} bytes are waiting already", waits_s)
            if loser is None:
                raise error
            self._refuse(self._pending[loser.ticket], error)
            queue = self._queue()

    def _overloaded(self, why: str, retry_s: float) -> Overloaded:
        self.metrics.rejected("queue")
        return Overloaded(f"{why}, try again in {1000 * retry_s:.0f} ms", retry_s)

    async def _arrival(self, wait_s: float | None) -> None:
        self._changed.clear()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._changed.wait(), wait_s)

    async def _compute(self, batch: list[PendingRequest]) -> None:
        predictor, kind = self._predictors[batch[0].request.fingerprint], kind_of(batch[0].request)
        started_s, key = time.monotonic(), batch[0].queued.key
        self._busy_until_s = started_s + self._times.predict(key, len(batch))
        note_turns(self._served, [pending.queued for pending in batch])
        results = await self._predict(predictor, kind, batch)
        ended_s = time.monotonic()
        self._busy_until_s = 0.0
        self._times.observe(key, len(batch), ended_s - started_s)
        queued_s = [started_s - pending.queued.arrived_s for pending in batch]
        self.metrics.batch(predictor.info.name, queued_s, ended_s - started_s)
        self.metrics.computed(predictor.info, kind.tap, kind.tasks, len(batch))
        for pending, waited_s, result in zip(batch, queued_s, results, strict=True):
            if isinstance(result, IsthmusError):
                resolve(pending, result)
                continue
            if pending.queued.deadline_s <= ended_s:
                self.metrics.expired("compute")
            resolve(pending, reply_of(result, waited_s, ended_s - started_s))

    async def _predict(
        self, predictor: Predictor, kind: Kind, batch: Sequence[PendingRequest]
    ) -> Sequence[TaskAnswers | IsthmusError]:
        """On the compute thread. Whatever fails, every caller gets a result and the worker lives on."""
        inputs = [pending.given for pending in batch if pending.given is not None]  # all: that is how they were chosen
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._thread, predictor.predict, kind, inputs)
        except Exception:
            self.metrics.log_failure("batch failed")
            return [ServiceError("the batch failed") for _ in batch]

    def _report_depth(self) -> None:
        self.metrics.queue_depth(len(self._pending))


def resolve(pending: PendingRequest, result: CloudReply | IsthmusError) -> None:
    """Give the caller its result, unless it has been cancelled."""
    if pending.reply.done():
        return
    if isinstance(result, IsthmusError):
        pending.reply.set_exception(result)
    else:
        pending.reply.set_result(result)


def reply_of(answers: TaskAnswers, queue_s: float, compute_s: float) -> CloudReply:
    """Probabilities and tensors apart, as a reply holds them."""
    tensors = tuple(each for answer in answers for each in answer if isinstance(each, OutputTensor))
    numbers = [tuple(each for each in answer if isinstance(each, float)) for answer in answers]
    return CloudReply(tuple(answer for answer in numbers if answer), queue_s, compute_s, tensors)


def queued_bytes(queue: Sequence[QueuedInput]) -> int:
    """Bytes of the payloads that wait."""
    return sum(queued.payload_bytes for queued in queue)


def kind_of(request: CloudRequest) -> Kind:
    """What the request must have in common with others of its batch."""
    payload = request.payload
    return Kind(payload.tap if payload.codec is Codec.BOTTLENECK else None, request.tasks)
