"""`Generate` on a real gRPC server in this process, with a real, tiny decoder."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import grpc
import pytest
from prometheus_client import CollectorRegistry

from isthmus.cloud_service import servicer
from isthmus.cloud_service.access import Device
from isthmus.cloud_service.byte_budget import ByteBudget
from isthmus.cloud_service.language import model_runner
from isthmus.cloud_service.language.handler import GenerateHandler
from isthmus.cloud_service.language.service import LanguageService
from isthmus.cloud_service.metrics import CloudMetrics
from isthmus.cloud_service.servicer import Servicer, attach
from isthmus.cloud_service.vision.batching import BatchLimits
from isthmus.cloud_service.vision.worker import Worker
from isthmus.models.language.checkpoint.checkpoint import Checkpoint
from isthmus.models.language.handoff.bundle import HandoffBundle
from isthmus.models.language.torch.decoder import Decoder
from isthmus.models.messages import Committed, Opening, Round
from isthmus.protos import limits, wire_describe, wire_session
from isthmus.protos.isthmus.v1 import isthmus_pb2 as pb
from isthmus.protos.isthmus.v1 import isthmus_pb2_grpc as pb_grpc
from tests.unit.cloud_service.language.tiny import EngineHarness, plain, until

Status = grpc.StatusCode
VOCAB = 259
PROMPT = [5, 6, 7]


class ServerHarness:
    """A servicer over one engine, and a client's stub."""

    def __init__(self, checkpoint: Checkpoint, decoder: Decoder, handoff: HandoffBundle | None = None) -> None:
        self.harness, self.registry = (
            EngineHarness(checkpoint, decoder, 100, [handoff] if handoff else []),
            CollectorRegistry(),
        )
        self.engine, self.decoder = self.harness.engine, self.harness.decoder
        self.metrics = CloudMetrics(self.registry, [])
        vision = Worker([], [], BatchLimits(), 1, self.metrics)
        self.servicer = Servicer(vision, LanguageService([self.engine]), self.metrics, ByteBudget(1 << 20))
        self.stub: Any = None

    def opening(self, tokens: Sequence[int] = PROMPT, start: int = 0, **fields: Any) -> pb.GenerateRequest:
        opening = Opening(
            model=self.engine.info.fingerprint,
            session=bytes(16),
            start=start,
            tokens=tuple(tokens[start:]),
            crc32=wire_session.checksum(tokens),
        )
        message = wire_session.pack_opening(opening)
        for name, value in fields.items():
            setattr(message.open, name, value)
        return message

    def count(self, code: str) -> float | None:
        return self.registry.get_sample_value("isthmus_cloud_requests_total", {"method": "Generate", "code": code})

    def attached(self) -> list[bool]:
        return [session.attached for session in self.engine._sessions]


Scene = Callable[[Callable[[ServerHarness], Awaitable[None]]], ServerHarness]


async def serve(
    play: Callable[[ServerHarness], Awaitable[None]],
    checkpoint: Checkpoint,
    decoder: Decoder,
    handoff: HandoffBundle | None = None,
) -> ServerHarness:
    """Run a play against a server on a free port; nothing may complain in the background."""
    harness, complaints = ServerHarness(checkpoint, decoder, handoff), []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: complaints.append(context))
    running = asyncio.create_task(harness.engine.run())
    server = grpc.aio.server(options=limits.server_options())
    attach(harness.servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        harness.stub = pb_grpc.IsthmusStub(channel)
        await asyncio.wait_for(play(harness), 30)
    await asyncio.wait_for(harness.servicer.drained(), 10)
    await server.stop(None)
    harness.decoder.gate.set()
    harness.engine.drain()
    await asyncio.wait_for(running, 10)
    assert complaints == []
    return harness


@pytest.fixture
def scene(checkpoint: Checkpoint, decoder: Decoder) -> Scene:
    return lambda play: asyncio.run(serve(play, checkpoint, decoder))


def asked(base: int, draft: Sequence[int] = (), extend: int = 0) -> pb.GenerateRequest:
    return wire_session.pack_round(Round(base, tuple(draft), extend))


async def read(call: Any) -> Committed:
    return wire_session.unpack_committed(await call.read(), VOCAB)


async def read_error(call: Any) -> grpc.StatusCode:
    code = (await call.read()).error.code
    return next(status for status in Status if status.value[0] == code)


def test_a_session_its_rounds_and_their_extension(scene: Scene, decoder: Decoder) -> None:
    expected = plain(decoder, PROMPT, 10)

    async def play(server: ServerHarness) -> None:
        call = server.stub.Generate()
        for message in (server.opening(), asked(3, expected[3:6], extend=3)):
            await call.write(message)
        first = await read(call)
        assert (first.base, first.accepted, first.tokens, first.extension) == (3, 3, (expected[6],), False)
        assert first.passes >= 1 and first.compute_s > 0
        extension = [await read(call) for _ in range(3)]
        assert [(answer.base, answer.tokens, answer.extension) for answer in extension] == [
            (position, (expected[position],), True) for position in (7, 8, 9)
        ]
        await call.done_writing()
        assert await call.read() is grpc.aio.EOF

    server = scene(play)
    assert server.count("OK") == 1
    assert server.attached() == [False]


def test_an_invalid_message_is_an_error_in_the_stream_and_affects_no_other(scene: Scene) -> None:
    async def play(server: ServerHarness) -> None:
        call = server.stub.Generate()
        wrong = {
            Status.INVALID_ARGUMENT: asked(3),  # before its opening
            Status.FAILED_PRECONDITION: server.opening(wire_version=9),
            Status.DATA_LOSS: server.opening(crc32=1),
            Status.NOT_FOUND: server.opening(model=b"12345678"),
        }
        for code, message in wrong.items():
            await call.write(message)
            assert await read_error(call) is code
        await call.write(server.opening())
        for message in (asked(0), asked(3, [VOCAB]), pb.GenerateRequest()):
            await call.write(message)
            assert await read_error(call) is Status.INVALID_ARGUMENT
        await call.write(asked(3))
        assert (await read(call)).base == 3
        await call.done_writing()

    server = scene(play)
    assert [server.count(code) for code in ("INVALID_ARGUMENT", "DATA_LOSS", "NOT_FOUND", "OK")] == [4, 1, 1, 1]


def test_an_unknown_model_is_an_error_that_lists_the_models(scene: Scene) -> None:
    async def play(server: ServerHarness) -> None:
        call = server.stub.Generate()
        await call.write(server.opening(model=b"12345678"))
        assert server.engine.info.fingerprint[:8].hex() in (await call.read()).error.message
        await call.done_writing()

    scene(play)


def test_a_lost_context_is_one_error_and_the_stream_opens_again(scene: Scene, decoder: Decoder) -> None:
    """Rounds that were sent along with the opening are not answered."""
    expected = plain(decoder, PROMPT, 8)

    async def play(server: ServerHarness) -> None:
        call = server.stub.Generate()
        for message in (server.opening(expected[:5], start=4), asked(5), asked(6, [1, 2])):
            await call.write(message)
        assert await read_error(call) is Status.ABORTED
        for message in (server.opening(expected[:5]), asked(5)):
            await call.write(message)
        assert (await read(call)).tokens == (expected[5],)
        await call.done_writing()
        assert await call.read() is grpc.aio.EOF

    server = scene(play)
    assert (server.count("ABORTED"), server.count("OK")) == (1, 1)


def test_a_session_that_another_stream_opens_is_one_error(scene: Scene) -> None:
    async def play(server: ServerHarness) -> None:
        first, second = server.stub.Generate(), server.stub.Generate()
        for call in (first, second):
            await call.write(server.opening())
            await call.write(asked(3))
            assert (await read(call)).base == 3
        assert await read_error(first) is Status.ABORTED
        await first.write(asked(4))
        await first.done_writing()
        assert await first.read() is grpc.aio.EOF
        await second.write(asked(4))
        assert (await read(second)).base == 4
        await second.done_writing()

    scene(play)


def test_answers_of_a_session_that_was_opened_again_on_its_stream_are_not_mixed(scene: Scene) -> None:
    """The reply to a round of the first opening is not sent after the second."""

    async def play(server: ServerHarness) -> None:
        call = server.stub.Generate()
        server.decoder.gate.clear()
        await call.write(server.opening())
        await call.write(asked(3, extend=50))
        await until(lambda: server.decoder.inside)
        await call.write(server.opening([9, 8, 7, 6]))
        await call.write(asked(4))
        await until(lambda: server.attached() == [False])
        server.decoder.gate.set()
        answer = await read(call)
        assert (answer.base, answer.extension) == (4, False)
        await call.done_writing()
        assert await call.read() is grpc.aio.EOF

    scene(play)


@pytest.mark.parametrize("opened", [True, False])
def test_draining_is_sent_to_every_stream_and_ends_it(scene: Scene, opened: bool) -> None:
    async def play(server: ServerHarness) -> None:
        call = server.stub.Generate()
        if opened:
            await call.write(server.opening())
            await call.write(asked(3))
            await read(call)
        else:
            await call.write(pb.GenerateRequest())
            await read_error(call)
        server.servicer.drain()
        assert await read_error(call) is Status.UNAVAILABLE
        assert await call.read() is grpc.aio.EOF
        assert (await call.code()) is Status.OK

    scene(play)


def test_a_drained_engine_sends_draining_to_its_sessions(scene: Scene) -> None:
    async def play(server: ServerHarness) -> None:
        call = server.stub.Generate()
        await call.write(server.opening())
        await call.write(asked(3))
        await read(call)
        server.engine.drain()
        assert await read_error(call) is Status.UNAVAILABLE
        assert await call.read() is grpc.aio.EOF

    scene(play)


def test_a_caller_that_disconnects_leaves_its_session_without_a_device(scene: Scene) -> None:
    async def play(server: ServerHarness) -> None:
        call = server.stub.Generate()
        await call.write(server.opening())
        await call.write(asked(3, extend=200))
        await read(call)
        call.cancel()
        await until(lambda: server.attached() == [False])
        await until(lambda: all(session.sequence.scheduled is None for session in server.engine._sessions))

    scene(play)


def test_what_is_outstanding_at_a_half_close_is_answered(scene: Scene, decoder: Decoder) -> None:
    expected = plain(decoder, PROMPT, 12)

    async def play(server: ServerHarness) -> None:
        server.decoder.gate.clear()
        messages = [server.opening(), asked(3, expected[3:6]), asked(6, expected[6:9], extend=2)]
        call = server.stub.Generate(iter(messages))
        await until(lambda: server.decoder.inside)
        await asyncio.sleep(0.05)
        server.decoder.gate.set()
        events = [wire_session.unpack_committed(message, VOCAB) async for message in call]
        assert [(answer.base, answer.accepted) for answer in events] == [(3, 3), (6, 3), (10, 0), (11, 0)]
        assert events[-1].tokens == (expected[11],)

    scene(play)


@pytest.mark.parametrize("broken", [True, False])
def test_a_half_close_with_nothing_outstanding_ends_the_stream(scene: Scene, broken: bool) -> None:
    async def play(server: ServerHarness) -> None:
        call = server.stub.Generate(iter([server.opening(crc32=1)] if broken else []))
        codes = [message.error.code async for message in call]
        assert codes == ([Status.DATA_LOSS.value[0]] if broken else [])

    scene(play)


def test_a_fault_of_the_service_is_an_error_without_details_and_the_stream_goes_on(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def play(server: ServerHarness) -> None:
        call = server.stub.Generate()
        with monkeypatch.context() as patch:
            patch.setattr(model_runner, "TokenSequence", None)
            await call.write(server.opening())
            message = await call.read()
            assert (message.error.code, message.error.message) == (13, "the service failed on this input")
        await call.write(server.opening())
        await call.write(asked(3))
        assert (await read(call)).base == 3
        await call.done_writing()

    assert scene(play).count("INTERNAL") == 1


def test_a_device_that_sends_and_does_not_read_is_not_read_either(checkpoint: Checkpoint, decoder: Decoder) -> None:
    async def flood() -> AsyncIterator[pb.GenerateRequest]:
        for _ in range(1000):
            yield pb.GenerateRequest()

    async def play() -> None:
        handler = GenerateHandler({}, "peer")
        listening = asyncio.create_task(
            ServerHarness(checkpoint, decoder).servicer._listen(flood(), handler, Device("peer"))
        )
        await asyncio.sleep(0.1)
        assert handler.events.qsize() == limits.MAX_STREAM_INFLIGHT
        events = 0
        while await handler.events.get() is not None:
            events += 1
        assert events == 1000
        await listening

    asyncio.run(asyncio.wait_for(play(), 30))


def test_describe_names_the_model(scene: Scene) -> None:
    async def play(server: ServerHarness) -> None:
        response = await server.stub.Describe(pb.DescribeRequest())
        assert wire_describe.unpack_service(response).models == (server.engine.info,)

    scene(play)


def test_the_tokenizer_that_describe_names_can_be_fetched(scene: Scene) -> None:
    async def play(server: ServerHarness) -> None:
        info = server.engine.info.tokenizer
        parts = [part async for part in server.stub.Tokenizer(pb.TokenizerRequest(sha256=info.sha256))]
        assert wire_describe.unpack_tokenizer(parts, info) == server.engine.tokenizer.to_bytes()

    scene(play)


@pytest.mark.parametrize("sha256", [b"", bytes(32), bytes(1000)])
def test_a_tokenizer_that_no_model_has_is_not_found(scene: Scene, sha256: bytes) -> None:
    async def play(server: ServerHarness) -> None:
        with pytest.raises(grpc.aio.AioRpcError, match="no model here has the tokenizer") as refused:
            await server.stub.Tokenizer(pb.TokenizerRequest(sha256=sha256)).read()
        assert refused.value.code() is Status.NOT_FOUND

    scene(play)


def test_a_large_message_is_unpacked_off_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[threading.Thread] = []
    unpack = wire_session.unpack_generate
    monkeypatch.setattr(
        wire_session, "unpack_generate", lambda message: threads.append(threading.current_thread()) or unpack(message)
    )
    for tokens in ([5] * 10, [200] * 20_000):
        opening = Opening(bytes(8), bytes(16), 0, tuple(tokens), wire_session.checksum(tokens))
        unpacked = asyncio.run(servicer.unpack_generate(wire_session.pack_opening(opening)))
        assert isinstance(unpacked, Opening)
        assert unpacked.tokens == tuple(tokens)
    assert [each is threading.main_thread() for each in threads] == [True, False]


def test_an_idle_stream_is_ended_and_one_whose_round_is_computed_is_not(scene: Scene, decoder: Decoder) -> None:
    async def play(server: ServerHarness) -> None:
        idle, busy = server.stub.Generate(), server.stub.Generate()
        server.decoder.gate.clear()
        for message in (server.opening(), asked(3)):
            await busy.write(message)
        await until(
            lambda: len(server.servicer._calls) == 2 and any(call._busy() for call in server.servicer._calls._open)
        )
        server.servicer._calls.end_idle(1e-6)
        assert await idle.read() is grpc.aio.EOF
        assert await idle.code() is Status.OK
        server.decoder.gate.set()
        assert (await read(busy)).tokens == tuple(plain(decoder, PROMPT, 1)[3:])
        last = asyncio.create_task(busy.read())
        while not last.done():  # its own end of the round may come after the reply
            server.servicer._calls.end_idle(1e-6)
            await asyncio.sleep(0.002)
        assert await last is grpc.aio.EOF

    scene(play)
