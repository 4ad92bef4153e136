"""`Generate` over a real gRPC server in this process, with a real, tiny decoder behind it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import grpc
import pytest
from prometheus_client import CollectorRegistry

from isthmus.cloud_service.language import model_runner
from isthmus.cloud_service.metrics import CloudMetrics
from isthmus.cloud_service.servicer import GenerateHandler, Servicer, attach, service_info
from isthmus.models.language.checkpoint.checkpoint import Checkpoint
from isthmus.models.language.handoff.bundle import HandoffBundle
from isthmus.models.language.torch.decoder import Decoder
from isthmus.models.messages import Committed, Opening, Round
from isthmus.protos import limits, wire, wire_session
from isthmus.protos.isthmus.v1 import isthmus_pb2 as pb
from isthmus.protos.isthmus.v1 import isthmus_pb2_grpc as pb_grpc
from tests.unit.cloud_service.language.tiny import House, plain, until

Status = grpc.StatusCode
VOCAB = 259
PROMPT = [5, 6, 7]


class Door:
    """A servicer over one generation, and a client's stub."""

    def __init__(self, checkpoint: Checkpoint, decoder: Decoder, handoff: HandoffBundle | None = None) -> None:
        self.house, self.registry = House(checkpoint, decoder, 100, [handoff] if handoff else []), CollectorRegistry()
        self.generation, self.decoder = self.house.generation, self.house.decoder
        self.metrics = CloudMetrics(self.registry, [])
        worker: Any = None  # no photo comes
        info = service_info((), (self.generation.info,))
        self.servicer = Servicer(worker, info, self.metrics, [self.generation])
        self.stub: Any = None

    def opening(self, tokens: Sequence[int] = PROMPT, start: int = 0, **fields: Any) -> pb.GenerateRequest:
        opening = Opening(
            model=self.generation.info.fingerprint,
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
        return [session.attached for session in self.generation._sessions]


Scene = Callable[[Callable[[Door], Awaitable[None]]], Door]


async def serve(
    play: Callable[[Door], Awaitable[None]],
    checkpoint: Checkpoint,
    decoder: Decoder,
    handoff: HandoffBundle | None = None,
) -> Door:
    """Run a play against a server on a free port; nothing may complain in the background."""
    door, complaints = Door(checkpoint, decoder, handoff), []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: complaints.append(context))
    running = asyncio.create_task(door.generation.run())
    server = grpc.aio.server(options=limits.server_options())
    attach(door.servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        door.stub = pb_grpc.IsthmusStub(channel)
        await asyncio.wait_for(play(door), 30)
    await asyncio.wait_for(door.servicer.drained(), 10)
    await server.stop(None)
    door.decoder.gate.set()
    door.generation.drain()
    await asyncio.wait_for(running, 10)
    assert complaints == []
    return door


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

    async def play(door: Door) -> None:
        call = door.stub.Generate()
        for message in (door.opening(), asked(3, expected[3:6], extend=3)):
            await call.write(message)
        first = await read(call)
        assert (first.base, first.accepted, first.tokens, first.extension) == (3, 3, (expected[6],), False)
        assert first.passes >= 1 and first.compute_s > 0
        behind = [await read(call) for _ in range(3)]
        assert [(answer.base, answer.tokens, answer.extension) for answer in behind] == [
            (position, (expected[position],), True) for position in (7, 8, 9)
        ]
        await call.done_writing()
        assert await call.read() is grpc.aio.EOF

    door = scene(play)
    assert door.count("OK") == 1
    assert door.attached() == [False]


def test_what_is_wrong_with_a_message_travels_in_the_stream_and_harms_nothing_else(scene: Scene) -> None:
    async def play(door: Door) -> None:
        call = door.stub.Generate()
        wrong = {
            Status.INVALID_ARGUMENT: asked(3),  # before its opening
            Status.FAILED_PRECONDITION: door.opening(wire_version=9),
            Status.DATA_LOSS: door.opening(crc32=1),
            Status.NOT_FOUND: door.opening(model=b"12345678"),
        }
        for code, message in wrong.items():
            await call.write(message)
            assert await read_error(call) is code
        await call.write(door.opening())
        for message in (asked(0), asked(3, [VOCAB]), pb.GenerateRequest()):
            await call.write(message)
            assert await read_error(call) is Status.INVALID_ARGUMENT
        await call.write(asked(3))
        assert (await read(call)).base == 3
        await call.done_writing()

    door = scene(play)
    assert [door.count(code) for code in ("INVALID_ARGUMENT", "DATA_LOSS", "NOT_FOUND", "OK")] == [4, 1, 1, 1]


def test_an_unknown_model_is_told_which_there_is(scene: Scene) -> None:
    async def play(door: Door) -> None:
        call = door.stub.Generate()
        await call.write(door.opening(model=b"12345678"))
        assert door.generation.info.fingerprint[:8].hex() in (await call.read()).error.message
        await call.done_writing()

    scene(play)


def test_a_lost_context_is_one_error_and_the_stream_opens_again(scene: Scene, decoder: Decoder) -> None:
    """Rounds that were sent along with the opening are not answered."""
    expected = plain(decoder, PROMPT, 8)

    async def play(door: Door) -> None:
        call = door.stub.Generate()
        for message in (door.opening(expected[:5], start=4), asked(5), asked(6, [1, 2])):
            await call.write(message)
        assert await read_error(call) is Status.ABORTED
        for message in (door.opening(expected[:5]), asked(5)):
            await call.write(message)
        assert (await read(call)).tokens == (expected[5],)
        await call.done_writing()
        assert await call.read() is grpc.aio.EOF

    door = scene(play)
    assert (door.count("ABORTED"), door.count("OK")) == (1, 1)


def test_a_session_that_another_stream_takes_is_one_error(scene: Scene) -> None:
    async def play(door: Door) -> None:
        first, second = door.stub.Generate(), door.stub.Generate()
        for call in (first, second):
            await call.write(door.opening())
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
    """The answer to a round of the first opening is not sent behind the second."""

    async def play(door: Door) -> None:
        call = door.stub.Generate()
        door.decoder.gate.clear()
        await call.write(door.opening())
        await call.write(asked(3, extend=50))
        await until(lambda: door.decoder.inside)
        await call.write(door.opening([9, 8, 7, 6]))
        await call.write(asked(4))
        await until(lambda: door.attached() == [False])
        door.decoder.gate.set()
        answer = await read(call)
        assert (answer.base, answer.extension) == (4, False)
        await call.done_writing()
        assert await call.read() is grpc.aio.EOF

    scene(play)


@pytest.mark.parametrize("opened", [True, False])
def test_draining_is_told_to_every_stream_and_ends_it(scene: Scene, opened: bool) -> None:
    async def play(door: Door) -> None:
        call = door.stub.Generate()
        if opened:
            await call.write(door.opening())
            await call.write(asked(3))
            await read(call)
        else:
            await call.write(pb.GenerateRequest())
            await read_error(call)
        door.servicer.drain()
        assert await read_error(call) is Status.UNAVAILABLE
        assert await call.read() is grpc.aio.EOF
        assert (await call.code()) is Status.OK

    scene(play)


def test_a_drained_generation_says_so_to_its_sessions(scene: Scene) -> None:
    async def play(door: Door) -> None:
        call = door.stub.Generate()
        await call.write(door.opening())
        await call.write(asked(3))
        await read(call)
        door.generation.drain()
        assert await read_error(call) is Status.UNAVAILABLE
        assert await call.read() is grpc.aio.EOF

    scene(play)


def test_a_caller_that_hangs_up_leaves_its_session_without_a_device(scene: Scene) -> None:
    async def play(door: Door) -> None:
        call = door.stub.Generate()
        await call.write(door.opening())
        await call.write(asked(3, extend=200))
        await read(call)
        call.cancel()
        await until(lambda: door.attached() == [False])
        await until(lambda: all(session.text.work is None for session in door.generation._sessions))

    scene(play)


def test_what_is_outstanding_at_a_half_close_is_answered(scene: Scene, decoder: Decoder) -> None:
    expected = plain(decoder, PROMPT, 12)

    async def play(door: Door) -> None:
        door.decoder.gate.clear()
        messages = [door.opening(), asked(3, expected[3:6]), asked(6, expected[6:9], extend=2)]
        call = door.stub.Generate(iter(messages))
        await until(lambda: door.decoder.inside)
        await asyncio.sleep(0.05)
        door.decoder.gate.set()
        answers = [wire_session.unpack_committed(message, VOCAB) async for message in call]
        assert [(answer.base, answer.accepted) for answer in answers] == [(3, 3), (6, 3), (10, 0), (11, 0)]
        assert answers[-1].tokens == (expected[11],)

    scene(play)


@pytest.mark.parametrize("broken", [True, False])
def test_a_half_close_with_nothing_outstanding_ends_the_stream(scene: Scene, broken: bool) -> None:
    async def play(door: Door) -> None:
        call = door.stub.Generate(iter([door.opening(crc32=1)] if broken else []))
        codes = [message.error.code async for message in call]
        assert codes == ([Status.DATA_LOSS.value[0]] if broken else [])

    scene(play)


def test_a_fault_of_ours_is_told_without_its_secrets_and_the_stream_lives_on(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def play(door: Door) -> None:
        call = door.stub.Generate()
        with monkeypatch.context() as patch:
            patch.setattr(model_runner, "TokenSequence", None)
            await call.write(door.opening())
            message = await call.read()
            assert (message.error.code, message.error.message) == (13, "the service failed on this input")
        await call.write(door.opening())
        await call.write(asked(3))
        assert (await read(call)).base == 3
        await call.done_writing()

    assert scene(play).count("INTERNAL") == 1


def test_a_device_that_sends_and_does_not_read_is_not_read_either(checkpoint: Checkpoint, decoder: Decoder) -> None:
    async def flood() -> AsyncIterator[pb.GenerateRequest]:
        for _ in range(1000):
            yield pb.GenerateRequest()

    async def play() -> None:
        talk = GenerateHandler({}, Door(checkpoint, decoder).metrics)
        listening = asyncio.create_task(talk.listen(flood()))
        await asyncio.sleep(0.1)
        assert talk.answers.qsize() == limits.MAX_STREAM_INFLIGHT
        answers = 0
        while await talk.answers.get() is not None:
            answers += 1
        assert answers == 1000
        await listening

    asyncio.run(asyncio.wait_for(play(), 30))


def test_describe_names_the_model(scene: Scene) -> None:
    async def play(door: Door) -> None:
        response = await door.stub.Describe(pb.DescribeRequest())
        assert wire.unpack_service(response).models == (door.generation.info,)

    scene(play)
