"""The gRPC service: unpack, pass on, await, pack. The only module of the cloud that knows gRPC contexts and stubs.

Imports neither wing: `VisionService` and `LanguageService` are all that it knows of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Iterator
from importlib.metadata import version
from typing import TypeVar

import grpc
from google.protobuf.message import DecodeError

from isthmus.cloud_service.access import Access, Device
from isthmus.cloud_service.authentication import Context, device_of
from isthmus.cloud_service.byte_budget import ByteBudget
from isthmus.cloud_service.metrics import CloudMetrics
from isthmus.cloud_service.open_calls import OpenCall, OpenCalls
from isthmus.cloud_service.outbox import Outbox
from isthmus.cloud_service.quotas import Usage
from isthmus.cloud_service.services import LanguageService, StreamHandler, VisionService
from isthmus.models.errors import (
    DeadlineExceeded,
    Draining,
    InvalidInput,
    IsthmusError,
    Overloaded,
    Refused,
    ServiceError,
)
from isthmus.models.messages import (
    CloudReply,
    Committed,
    Opening,
    Round,
    ServiceInfo,
)
from isthmus.protos import limits, status, wire, wire_describe, wire_session
from isthmus.protos.isthmus.v1 import isthmus_pb2 as pb
from isthmus.protos.isthmus.v1 import isthmus_pb2_grpc as pb_grpc

LARGE_MESSAGE_BYTES = 16 << 10  # of a prompt or of hidden states: unpacking more takes up to 20 ms

T = TypeVar("T")
UNDECODABLE = "the stream carries bytes that are not a message"
MAX_CALLS = 1024  # streams and requests; health, reflection and Describe are not among them
DRAIN_POLL_S = 0.02


class Servicer(pb_grpc.IsthmusServicer):
    """isthmus.v1.Isthmus over both wings."""

    def __init__(
        self,
        vision: VisionService,
        language: LanguageService,
        metrics: CloudMetrics,
        queue: ByteBudget,
        access: Access | None = None,
    ) -> None:
        """`queue`: for payloads and answers that wait. `access`: who may use the service; without it everyone."""
        self._vision, self._language = vision, language
        self._version = version("isthmus")
        self._metrics, self._queue, self.access = metrics, queue, access or Access()
        self._draining = asyncio.Event()
        self._calls = OpenCalls(MAX_CALLS)

    def end_refused(self) -> None:
        """End the calls of devices that may not use the service any more."""

        def why(device: Device) -> Refused | None:
            refusal = self.access.refusal(device)
            return refusal[0] if refusal else None

        self._calls.refuse(why)

    def drain(self) -> None:
        """Ask every stream to half-close; outstanding requests are still answered."""
        self._draining.set()

    async def drained(self) -> None:
        """Return when no call is open. A stream that is idle for longer than a goodbye takes is ended."""
        await asyncio.sleep(DRAIN_POLL_S)  # calls that came with the last one are open by then
        while self._calls:
            self._calls.end_idle(limits.GOODBYE_S)
            await asyncio.sleep(DRAIN_POLL_S)

    async def end_idle_streams(self) -> None:
        """Until cancelled, end each stream over which nothing goes for too long."""
        while True:
            await asyncio.sleep(limits.IDLE_STREAM_S)
            self._calls.end_idle(limits.MAX_IDLE_S)

    async def Infer(self, request: pb.InferRequest, context: Context) -> pb.InferResponse:
        call = OpenCall(device_of(context, self.access), lambda: True, lambda: None)
        async with self._open(call, context):
            response = await self._answer(request, "Infer", call.device, context.time_remaining())
        if response.HasField("error"):
            error = response.error
            pushback = ((limits.RETRY_PUSHBACK, str(error.retry_ms)),) if error.retry_ms else ()
            await context.abort(status.code_of(error.code), error.message, pushback)
        return response

    async def InferStream(
        self, requests: AsyncIterator[pb.InferRequest], context: Context
    ) -> AsyncIterator[pb.InferResponse]:
        outbox: Outbox[pb.InferResponse | IsthmusError] = Outbox(limits.MAX_STREAM_INFLIGHT, self._queue)
        computing: set[asyncio.Task[None]] = set()
        device = device_of(context, self.access)
        call = OpenCall(device, lambda: bool(computing), lambda: outbox.notify(None), outbox.notify)
        notice = wire.pack_error(0, Draining("the service is shutting down; send nothing more here"))
        async with self._open(call, context):
            feeder = asyncio.create_task(self._feed(call.reading(requests), outbox, computing, call.device))
            drain_notice = asyncio.create_task(self._notify_drain(outbox.notify, notice))
            try:
                async for response in outbox.messages():
                    if isinstance(response, IsthmusError):
                        feeder.cancel()  # after an abort there is nothing to read from
                        await context.abort(*status.of_error(response))
                    else:
                        with call.writing():
                            yield response
            finally:
                drain_notice.cancel()
                feeder.cancel()
                outbox.close()

    async def Generate(
        self, requests: AsyncIterator[pb.GenerateRequest], context: Context
    ) -> AsyncIterator[pb.GenerateResponse]:
        device = device_of(context, self.access)
        handler = self._language.new_handler(device.peer, self.access.quota(device).session_bytes)

        def refuse(error: Refused) -> None:
            handler.events.put_nowait(error)
            handler.events.put_nowait(None)

        call = OpenCall(device, lambda: handler.busy, lambda: handler.events.put_nowait(None), refuse)
        notice = Draining("the service is shutting down")
        async with self._open(call, context):
            listener = asyncio.create_task(self._listen(call.reading(requests), handler, device))
            drain_notice = asyncio.create_task(self._notify_drain(handler.events.put_nowait, notice))
            try:
                while (event := await handler.events.get()) is not None:
                    with call.writing():
                        yield self._pack(event, device)
                    if isinstance(event, Draining):
                        break
            finally:
                drain_notice.cancel()
                listener.cancel()
                handler.leave()

    async def Describe(self, request: pb.DescribeRequest, context: Context) -> pb.DescribeResponse:
        started_s = time.monotonic()
        if (size := max(len(request.padding), request.reply_bytes)) > limits.MAX_PROBE_BYTES:
            error = InvalidInput(f"padding has {size} bytes, at most {limits.MAX_PROBE_BYTES} are accepted")
            code, text = status.of_error(error)
            self._metrics.answered("Describe", code.name, time.monotonic() - started_s)
            await context.abort(code, text)
        self._metrics.answered("Describe", "OK", time.monotonic() - started_s)
        language = self._language
        info = ServiceInfo(self._version, limits.WIRE_VERSION, self._vision.bundles, language.models, language.problems)
        return wire_describe.pack_service(info, request.reply_bytes)

    async def Tokenizer(self, request: pb.TokenizerRequest, context: Context) -> AsyncIterator[pb.TokenizerPart]:
        started_s = time.monotonic()
        call = OpenCall(device_of(context, self.access), lambda: True, lambda: None)
        async with self._open(call, context):
            raw = self._language.tokenizer(request.sha256)
            if raw is None:
                self._metrics.answered("Tokenizer", "NOT_FOUND", time.monotonic() - started_s)
                text = f"no model here has the tokenizer {request.sha256[: limits.FINGERPRINT_BYTES].hex()[:12]}"
                await context.abort(grpc.StatusCode.NOT_FOUND, text)
            else:
                for part in wire_describe.pack_tokenizer(raw):
                    with call.writing():
                        yield part
                self._metrics.answered("Tokenizer", "OK", time.monotonic() - started_s)

    @contextlib.asynccontextmanager
    async def _open(self, call: OpenCall, context: Context) -> AsyncIterator[None]:
        """Count the call as open; with no place for it the call is aborted."""
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(self._calls.open(call))
            except Overloaded as error:
                self._metrics.rejected("calls")
                await context.abort(*status.of_error(error))
            yield

    async def _feed(
        self,
        requests: AsyncIterator[pb.InferRequest],
        outbox: Outbox[pb.InferResponse | IsthmusError],
        computing: set[asyncio.Task[None]],
        device: Device,
    ) -> None:
        """Answer requests as they arrive; one is read when there is a place for it. None follows the last response.

        Bytes that are no message end the stream with an error, once what came before them is answered.
        """
        undecodable = True
        try:
            async with asyncio.TaskGroup() as group:
                with contextlib.suppress(DecodeError):
                    await outbox.place()
                    async for message in requests:
                        computing.add(task := group.create_task(self._answer_into(outbox, message, device)))
                        task.add_done_callback(computing.discard)
                        await outbox.place()
                    undecodable = False
            if undecodable:
                outbox.notify(InvalidInput(UNDECODABLE))
        finally:
            outbox.notify(None)

    async def _answer_into(
        self, outbox: Outbox[pb.InferResponse | IsthmusError], message: pb.InferRequest, device: Device
    ) -> None:
        response = await self._answer(message, "InferStream", device, None)
        try:
            outbox.put(response, response.ByteSize())
        except Overloaded as error:
            self._metrics.rejected("queue")
            outbox.put(wire.pack_error(message.request_id, error), 0)

    async def _listen(
        self, requests: AsyncIterator[pb.GenerateRequest], handler: StreamHandler, device: Device
    ) -> None:
        """Read messages until the device half-closes. An invalid one is answered with an error, and reading goes on.

        Bytes that are no message at all count as the end: gRPC reads nothing after them.
        """
        try:
            async for message in requests:
                await self._handle(message, handler, device)
                while handler.events.qsize() >= limits.MAX_STREAM_INFLIGHT:  # the device sends without reading
                    await asyncio.sleep(0.02)
        except DecodeError:
            handler.events.put_nowait(InvalidInput(UNDECODABLE))
        handler.end()

    async def _handle(self, message: pb.GenerateRequest, handler: StreamHandler, device: Device) -> None:
        try:
            opening = message.WhichOneof("kind") == "open"
            if opening:
                handler.begin_opening()
            self._spend(device, Usage(int(opening), message.ByteSize()))
            request = await unpack_generate(message)
            if isinstance(request, Opening):
                self.access.spend(device, Usage(tokens=len(request.tokens)), used=True)
            await handler.handle(request)
        except IsthmusError as error:
            handler.events.put_nowait(error)
        except Exception:  # a fault of the service
            self._metrics.log_failure("message failed")
            handler.events.put_nowait(ServiceError("the message failed"))

    async def _notify_drain(self, notify: Callable[[T], None], notice: T) -> None:
        await self._draining.wait()
        notify(notice)

    def _spend(self, device: Device, usage: Usage) -> None:
        """Raises Overloaded beyond the device's quota."""
        try:
            self.access.spend(device, usage)
        except Overloaded:
            self._metrics.rejected("quota")
            raise

    def _pack(self, event: Committed | IsthmusError, device: Device) -> pb.GenerateResponse:
        if isinstance(event, IsthmusError):
            self._metrics.answered("Generate", status.of_error(event)[0].name, 0.0)
            return wire_session.pack_generate_error(event)
        self.access.spend(device, Usage(tokens=len(event.tokens)), used=True)
        if not event.extension:
            self._metrics.answered("Generate", "OK", event.queue_s + event.compute_s)
        return wire_session.pack_committed(event)

    async def _answer(
        self, message: pb.InferRequest, method: str, device: Device, remaining_s: float | None
    ) -> pb.InferResponse:
        """The response to one message, errors included. `remaining_s`: until the call's own deadline, if it has one."""
        started_s = time.monotonic()
        self._metrics.started()
        try:
            response = wire.pack_answer(message.request_id, await self._submit(message, device, remaining_s))
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

    async def _submit(self, message: pb.InferRequest, device: Device, remaining_s: float | None) -> CloudReply:
        try:
            request = wire.unpack_request(message)
        except IsthmusError as error:
            self._metrics.unreadable(error, on_arrival=True)
            raise
        if remaining_s is not None and remaining_s <= 0:
            self._metrics.rejected("deadline")
            raise DeadlineExceeded("the call's deadline had passed on arrival")
        self._spend(device, Usage(1, message.ByteSize()))
        try:
            with self._waiting(len(request.payload.data)):
                return await self._vision.submit(request, device.peer)
        except IsthmusError as error:
            self._metrics.unreadable(error, on_arrival=False)
            raise

    @contextlib.contextmanager
    def _waiting(self, size_bytes: int) -> Iterator[None]:
        """Count a payload in the budget. Raises Overloaded where it does not fit."""
        try:
            self._queue.take(size_bytes)
        except Overloaded:
            self._metrics.rejected("queue")
            raise
        try:
            yield
        finally:
            self._queue.give(size_bytes)


async def unpack_generate(message: pb.GenerateRequest) -> Opening | Round:
    """Raises what `wire_session.unpack_generate` raises; it takes a large message off the event loop."""
    if message.ByteSize() <= LARGE_MESSAGE_BYTES:
        return wire_session.unpack_generate(message)
    return await asyncio.get_running_loop().run_in_executor(None, wire_session.unpack_generate, message)


def attach(servicer: Servicer, server: grpc.aio.Server) -> None:
    """Register the service on a server."""
    pb_grpc.add_IsthmusServicer_to_server(servicer, server)


SERVICE_NAME: str = pb.DESCRIPTOR.services_by_name["Isthmus"].full_name
