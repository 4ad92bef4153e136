"""The service's door: unpack, submit, await, pack. The only module of the cloud that knows gRPC contexts and stubs."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from importlib.metadata import version
from typing import Any, TypeVar

import grpc
from google.protobuf.message import DecodeError

from isthmus.cloud_service.language.engine import LanguageEngine
from isthmus.cloud_service.language.sessions import EventQueue, Session
from isthmus.cloud_service.metrics import CloudMetrics
from isthmus.cloud_service.vision.worker import Worker
from isthmus.models.errors import DeadlineExceeded, Draining, InvalidInput, IsthmusError, ServiceError, UnknownBundle
from isthmus.models.messages import BundleInfo, CloudReply, Committed, ModelInfo, Opening, ServiceInfo
from isthmus.protos import limits, status, wire, wire_session
from isthmus.protos.isthmus.v1 import isthmus_pb2 as pb
from isthmus.protos.isthmus.v1 import isthmus_pb2_grpc as pb_grpc

T = TypeVar("T")


class Servicer(pb_grpc.IsthmusServicer):
    """isthmus.v1.Isthmus over one worker."""

    def __init__(
        self, worker: Worker, info: ServiceInfo, metrics: CloudMetrics, generations: Sequence[LanguageEngine] = ()
    ) -> None:
        self._worker = worker
        self._generations = {
            generation.info.fingerprint[: limits.BUNDLE_ID_BYTES]: generation for generation in generations
        }
        self._info = info
        self._metrics = metrics
        self._draining = asyncio.Event()
        self._streams = 0

    def drain(self) -> None:
        """Ask every stream to half-close; what is outstanding is still answered."""
        self._draining.set()

    async def drained(self) -> None:
        """Return when no stream is left."""
        while self._streams:
            await asyncio.sleep(0.02)

    async def Infer(self, request: pb.InferRequest, context: grpc.aio.ServicerContext[Any, Any]) -> pb.InferResponse:
        response = await self._answer(request, "Infer", context.time_remaining())
        if response.HasField("error"):
            await context.abort(status.code_of(response.error.code), response.error.message)
        return response

    async def InferStream(
        self, requests: AsyncIterator[pb.InferRequest], context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[pb.InferResponse]:
        ready: asyncio.Queue[pb.InferResponse | None] = asyncio.Queue()
        feeder = asyncio.create_task(self._feed(requests, ready))
        bye = wire.pack_error(0, Draining("the service is shutting down; send nothing more here"))
        farewell = asyncio.create_task(self._farewell(ready, bye))
        self._streams += 1
        try:
            while (response := await ready.get()) is not None:
                yield response
        finally:
            self._streams -= 1
            farewell.cancel()
            feeder.cancel()

    async def Generate(
        self, requests: AsyncIterator[pb.GenerateRequest], context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[pb.GenerateResponse]:
        talk = GenerateHandler(self._generations, self._metrics)
        feeder = asyncio.create_task(talk.listen(requests))
        farewell = asyncio.create_task(self._farewell(talk.answers, Draining("the service is shutting down")))
        self._streams += 1
        try:
            while (answer := await talk.answers.get()) is not None:
                yield self._pack(answer)
                if isinstance(answer, Draining):
                    break
        finally:
            self._streams -= 1
            farewell.cancel()
            feeder.cancel()
            talk.leave()

    async def Describe(
        self, request: pb.DescribeRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.DescribeResponse:
        started_s = time.monotonic()
        if len(request.padding) > limits.MAX_PROBE_BYTES:
            error = InvalidInput(
                f"padding has {len(request.padding)} bytes, at most {limits.MAX_PROBE_BYTES} are taken"
            )
            code, text = status.of_error(error)
            self._metrics.answered("Describe", code.name, time.monotonic() - started_s)
            await context.abort(code, text)
        self._metrics.answered("Describe", "OK", time.monotonic() - started_s)
        return wire.pack_service(self._info)

    async def _feed(
        self, requests: AsyncIterator[pb.InferRequest], ready: asyncio.Queue[pb.InferResponse | None]
    ) -> None:
        """Answer what arrives, at most MAX_STREAM_INFLIGHT at once; None follows the last answer."""
        places = asyncio.Semaphore(limits.MAX_STREAM_INFLIGHT)

        async def answer(message: pb.InferRequest) -> None:
            try:
                ready.put_nowait(await self._answer(message, "InferStream", None))
            finally:
                places.release()

        try:
            async with asyncio.TaskGroup() as group:
                async for message in requests:
                    await places.acquire()
                    group.create_task(answer(message))
        finally:
            ready.put_nowait(None)

    async def _farewell(self, queue: asyncio.Queue[T], bye: T) -> None:
        await self._draining.wait()
        queue.put_nowait(bye)

    def _pack(self, answer: Committed | IsthmusError) -> pb.GenerateResponse:
        if isinstance(answer, IsthmusError):
            self._metrics.answered("Generate", status.of_error(answer)[0].name, 0.0)
            return wire_session.pack_generate_error(answer)
        if not answer.extension:
            self._metrics.answered("Generate", "OK", answer.queue_s + answer.compute_s)
        return wire_session.pack_committed(answer)

    async def _answer(self, message: pb.InferRequest, method: str, remaining_s: float | None) -> pb.InferResponse:
        """Answer one message, errors included. `remaining_s` is the call's own deadline, if it has one."""
        started_s = time.monotonic()
        self._metrics.started()
        try:
            response = wire.pack_answer(message.request_id, await self._submit(message, remaining_s))
            code = grpc.StatusCode.OK
        except IsthmusError as error:
            response, (code, _) = wire.pack_error(message.request_id, error), status.of_error(error)
        except Exception as error:  # a fault of ours harms this input alone
            self._metrics.log_failure("input failed")
            response, (code, _) = wire.pack_error(message.request_id, error), status.of_error(error)
        finally:
            self._metrics.ended()
        self._metrics.answered(method, code.name, time.monotonic() - started_s)
        return response

    async def _submit(self, message: pb.InferRequest, remaining_s: float | None) -> CloudReply:
        try:
            request = wire.unpack_request(message)
        except IsthmusError as error:
            self._metrics.unreadable(error, on_arrival=True)
            raise
        if remaining_s is not None and remaining_s <= 0:
            self._metrics.rejected("deadline")
            raise DeadlineExceeded("the call's deadline had passed on arrival")
        try:
            return await self._worker.submit(request)
        except IsthmusError as error:
            self._metrics.unreadable(error, on_arrival=False)
            raise


class GenerateHandler:
    """What one device says about one answer. `answers` ends with None after the last of a stream that half-closed."""

    def __init__(self, generations: Mapping[bytes, LanguageEngine], metrics: CloudMetrics) -> None:
        self._generations = generations
        self._metrics = metrics
        self._generation: LanguageEngine | None = None
        self._session: Session | None = None
        self._opened = False  # or tried to
        self.answers: EventQueue = asyncio.Queue()

    async def listen(self, requests: AsyncIterator[pb.GenerateRequest]) -> None:
        """Take messages until the device half-closes. What is wrong with one is answered, and the next one read.

        Bytes that are no message at all count as the end: gRPC reads nothing behind them.
        """
        try:
            await self._listen(requests)
        except DecodeError:
            self.answers.put_nowait(InvalidInput("the stream carries bytes that are not a message"))
        if self._generation is not None and self._session is not None:
            self._generation.end(self._session)
        else:
            self.answers.put_nowait(None)

    async def _listen(self, requests: AsyncIterator[pb.GenerateRequest]) -> None:
        async for message in requests:
            try:
                await self._take(message)
            except IsthmusError as error:
                self.answers.put_nowait(error)
            except Exception:  # a fault of ours
                self._metrics.log_failure("message failed")
                self.answers.put_nowait(ServiceError("the message failed"))
            while self.answers.qsize() >= limits.MAX_STREAM_INFLIGHT:  # it sends, and does not read
                await asyncio.sleep(0.02)

    def leave(self) -> None:
        """The device has gone."""
        if self._generation is not None and self._session is not None:
            self._generation.leave(self._session)
        self._session = None

    async def _take(self, message: pb.GenerateRequest) -> None:
        """Rounds that were on their way when their opening failed are dropped: the one error answers them all."""
        if message.WhichOneof("kind") == "open":
            self.leave()
            self._opened = True
        request = wire_session.unpack_generate(message)
        if isinstance(request, Opening):
            self._generation = self._generations.get(request.model)
            if self._generation is None:
                held = ", ".join(sorted(key.hex() for key in self._generations)) or "none"
                raise UnknownBundle(f"model {request.model.hex()} is not held here, there is {held}")
            self._session = await self._generation.open(request, self.answers)
        elif not self._opened:
            raise InvalidInput("a round came before its session was opened")
        elif self._generation is not None and self._session is not None:
            self._generation.add(self._session, request)


def service_info(bundles: tuple[BundleInfo, ...], models: tuple[ModelInfo, ...] = ()) -> ServiceInfo:
    """What `Describe` answers."""
    return ServiceInfo(version("isthmus"), limits.WIRE_VERSION, bundles, models)


def attach(servicer: Servicer, server: grpc.aio.Server) -> None:
    """Register the service on a server."""
    pb_grpc.add_IsthmusServicer_to_server(servicer, server)


SERVICE_NAME: str = pb.DESCRIPTOR.services_by_name["Isthmus"].full_name
