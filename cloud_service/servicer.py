"""The gRPC service: unpack, pass on, await, pack. The only module of the cloud that knows gRPC contexts and stubs.

Imports neither wing: `VisionService` and `LanguageService` are all that it knows of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from importlib.metadata import version
from typing import Any, Protocol, TypeVar

import grpc
from google.protobuf.message import DecodeError

from isthmus.cloud_service.metrics import CloudMetrics
from isthmus.models.errors import DeadlineExceeded, Draining, InvalidInput, IsthmusError, ServiceError
from isthmus.models.messages import (
    BundleInfo,
    CloudReply,
    CloudRequest,
    Committed,
    ModelInfo,
    Opening,
    Round,
    ServiceInfo,
)
from isthmus.protos import limits, status, wire, wire_session
from isthmus.protos.isthmus.v1 import isthmus_pb2 as pb
from isthmus.protos.isthmus.v1 import isthmus_pb2_grpc as pb_grpc

LARGE_MESSAGE_BYTES = 16 << 10  # of a prompt or of hidden states: unpacking more takes up to 20 ms

T = TypeVar("T")
UNDECODABLE = "the stream carries bytes that are not a message"


class VisionService(Protocol):
    """Predicts from photos and latents."""

    @property
    def bundles(self) -> tuple[BundleInfo, ...]: ...

    async def submit(self, request: CloudRequest, peer: str) -> CloudReply: ...


class StreamHandler(Protocol):
    """Handles the messages of one `Generate` stream. In `events` None follows the last one."""

    @property
    def events(self) -> asyncio.Queue[Committed | IsthmusError | None]: ...

    def begin_opening(self) -> None: ...

    async def handle(self, request: Opening | Round) -> None: ...

    def end(self) -> None: ...

    def leave(self) -> None: ...


class LanguageService(Protocol):
    """Generates tokens in sessions."""

    @property
    def models(self) -> tuple[ModelInfo, ...]: ...

    def new_handler(self, peer: str) -> StreamHandler: ...


class Servicer(pb_grpc.IsthmusServicer):
    """isthmus.v1.Isthmus over both wings."""

    def __init__(self, vision: VisionService, language: LanguageService, metrics: CloudMetrics) -> None:
        self._vision, self._language = vision, language
        self._info = ServiceInfo(version("isthmus"), limits.WIRE_VERSION, vision.bundles, language.models)
        self._metrics = metrics
        self._draining = asyncio.Event()
        self._streams = 0

    def drain(self) -> None:
        """Ask every stream to half-close; outstanding requests are still answered."""
        self._draining.set()

    async def drained(self) -> None:
        """Return when no stream is open."""
        while self._streams:
            await asyncio.sleep(0.02)

    async def Infer(self, request: pb.InferRequest, context: grpc.aio.ServicerContext[Any, Any]) -> pb.InferResponse:
        response = await self._answer(request, "Infer", peer_of(context), context.time_remaining())
        if response.HasField("error"):
            error = response.error
            pushback = ((limits.RETRY_PUSHBACK, str(error.retry_ms)),) if error.retry_ms else ()
            await context.abort(status.code_of(error.code), error.message, pushback)
        return response

    async def InferStream(
        self, requests: AsyncIterator[pb.InferRequest], context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[pb.InferResponse]:
        ready: asyncio.Queue[pb.InferResponse | InvalidInput | None] = asyncio.Queue()
        feeder = asyncio.create_task(self._feed(requests, ready, peer_of(context)))
        notice = wire.pack_error(0, Draining("the service is shutting down; send nothing more here"))
        drain_notice = asyncio.create_task(self._notify_drain(ready, notice))
        self._streams += 1
        try:
            while (response := await ready.get()) is not None:
                if isinstance(response, InvalidInput):
                    await context.abort(*status.of_error(response))
                else:
                    yield response
        finally:
            self._streams -= 1
            drain_notice.cancel()
            feeder.cancel()

    async def Generate(
        self, requests: AsyncIterator[pb.GenerateRequest], context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[pb.GenerateResponse]:
        handler = self._language.new_handler(peer_of(context))
        listener = asyncio.create_task(self._listen(requests, handler))
        notice = Draining("the service is shutting down")
        drain_notice = asyncio.create_task(self._notify_drain(handler.events, notice))
        self._streams += 1
        try:
            while (event := await handler.events.get()) is not None:
                yield self._pack(event)
                if isinstance(event, Draining):
                    break
        finally:
            self._streams -= 1
            drain_notice.cancel()
            listener.cancel()
            handler.leave()

    async def Describe(
        self, request: pb.DescribeRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.DescribeResponse:
        started_s = time.monotonic()
        if len(request.padding) > limits.MAX_PROBE_BYTES:
            error = InvalidInput(
                f"padding has {len(request.padding)} bytes, at most {limits.MAX_PROBE_BYTES} are accepted"
            )
            code, text = status.of_error(error)
            self._metrics.answered("Describe", code.name, time.monotonic() - started_s)
            await context.abort(code, text)
        self._metrics.answered("Describe", "OK", time.monotonic() - started_s)
        return wire.pack_service(self._info)

    async def _feed(
        self,
        requests: AsyncIterator[pb.InferRequest],
        ready: asyncio.Queue[pb.InferResponse | InvalidInput | None],
        peer: str,
    ) -> None:
        """Answer requests as they arrive, at most MAX_STREAM_INFLIGHT at once; None follows the last response.

        Bytes that are no message end the stream with an error, once what came before them is answered.
        """
        slots, undecodable = asyncio.Semaphore(limits.MAX_STREAM_INFLIGHT), True

        async def answer(message: pb.InferRequest) -> None:
            try:
                ready.put_nowait(await self._answer(message, "InferStream", peer, None))
            finally:
                slots.release()

        try:
            async with asyncio.TaskGroup() as group:
                with contextlib.suppress(DecodeError):
                    async for message in requests:
                        await slots.acquire()
                        group.create_task(answer(message))
                    undecodable = False
            if undecodable:
                ready.put_nowait(InvalidInput(UNDECODABLE))
        finally:
            ready.put_nowait(None)

    async def _listen(self, requests: AsyncIterator[pb.GenerateRequest], handler: StreamHandler) -> None:
        """Read messages until the device half-closes. An invalid one is answered with an error, and reading goes on.

        Bytes that are no message at all count as the end: gRPC reads nothing after them.
        """
        try:
            async for message in requests:
                await self._handle(message, handler)
                while handler.events.qsize() >= limits.MAX_STREAM_INFLIGHT:  # the device sends without reading
                    await asyncio.sleep(0.02)
        except DecodeError:
            handler.events.put_nowait(InvalidInput(UNDECODABLE))
        handler.end()

    async def _handle(self, message: pb.GenerateRequest, handler: StreamHandler) -> None:
        try:
            if message.WhichOneof("kind") == "open":
                handler.begin_opening()
            await handler.handle(await unpack_generate(message))
        except IsthmusError as error:
            handler.events.put_nowait(error)
        except Exception:  # a fault of the service
            self._metrics.log_failure("message failed")
            handler.events.put_nowait(ServiceError("the message failed"))

    async def _notify_drain(self, queue: asyncio.Queue[T], notice: T) -> None:
        await self._draining.wait()
        queue.put_nowait(notice)

    def _pack(self, event: Committed | IsthmusError) -> pb.GenerateResponse:
        if isinstance(event, IsthmusError):
            self._metrics.answered("Generate", status.of_error(event)[0].name, 0.0)
            return wire_session.pack_generate_error(event)
        if not event.extension:
            self._metrics.answered("Generate", "OK", event.queue_s + event.compute_s)
        return wire_session.pack_committed(event)

    async def _answer(
        self, message: pb.InferRequest, method: str, peer: str, remaining_s: float | None
    ) -> pb.InferResponse:
        """The response to one message, errors included. `remaining_s`: until the call's own deadline, if it has one."""
        started_s = time.monotonic()
        self._metrics.started()
        try:
            response = wire.pack_answer(message.request_id, await self._submit(message, peer, remaining_s))
            code = grpc.StatusCode.OK
        except IsthmusError as error:
            response, (code, _) = wire.pack_error(message.request_id, error), status.of_error(error)
        except Exception as error:  # a fault of the service fails this input alone
            self._metrics.log_failure("input failed")
            response, (code, _) = wire.pack_error(message.request_id, error), status.of_error(error)
        finally:
            self._metrics.ended()
        self._metrics.answered(method, code.name, time.monotonic() - started_s)
        return response

    async def _submit(self, message: pb.InferRequest, peer: str, remaining_s: float | None) -> CloudReply:
        try:
            request = wire.unpack_request(message)
        except IsthmusError as error:
            self._metrics.unreadable(error, on_arrival=True)
            raise
        if remaining_s is not None and remaining_s <= 0:
            self._metrics.rejected("deadline")
            raise DeadlineExceeded("the call's deadline had passed on arrival")
        try:
            return await self._vision.submit(request, peer)
        except IsthmusError as error:
            self._metrics.unreadable(error, on_arrival=False)
            raise


def peer_of(context: grpc.aio.ServicerContext[Any, Any]) -> str:
    """Who takes turns with others: the name in the device's certificate, or else its connection.

    Without certificates an address proves nothing, and all devices behind one router or proxy share it.
    """
    names: Sequence[bytes] = context.peer_identities() or ()
    return b", ".join(names).decode(errors="replace") or context.peer()


async def unpack_generate(message: pb.GenerateRequest) -> Opening | Round:
    """Raises what `wire_session.unpack_generate` raises; it takes a large message off the event loop."""
    if message.ByteSize() <= LARGE_MESSAGE_BYTES:
        return wire_session.unpack_generate(message)
    return await asyncio.get_running_loop().run_in_executor(None, wire_session.unpack_generate, message)


def attach(servicer: Servicer, server: grpc.aio.Server) -> None:
    """Register the service on a server."""
    pb_grpc.add_IsthmusServicer_to_server(servicer, server)


SERVICE_NAME: str = pb.DESCRIPTOR.services_by_name["Isthmus"].full_name
