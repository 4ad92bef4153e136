"""Hidden states over a real gRPC server in this process: an invalid message affects no other."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import pytest

from isthmus.models.language.checkpoint.checkpoint import Checkpoint
from isthmus.models.language.handoff.bundle import HandoffBundle
from isthmus.models.language.torch.decoder import Decoder
from isthmus.protos import limits, wire_describe, wire_session
from isthmus.protos.isthmus.v1 import isthmus_pb2 as pb
from tests.unit.cloud_service.language.tiny import StateDevice
from tests.unit.cloud_service.test_servicer_generate import ServerHarness, asked, read, read_error, serve

Status = grpc.StatusCode
PROMPT = list(range(10, 30))


class Caller(StateDevice):
    """Its messages, and a stream that they go up on."""

    def __init__(self, server: ServerHarness, decoder: Decoder, handoff: HandoffBundle) -> None:
        super().__init__(server.harness, decoder, handoff, 1, PROMPT)
        self.call: Any = server.stub.Generate()

    def opened(self, **fields: Any) -> pb.GenerateRequest:
        message = wire_session.pack_opening(self.opening())
        for name, value in fields.items():
            setattr(message.open, name, value)
        return message

    def rounded(self, base: int = 0, extend: int = 1) -> pb.GenerateRequest:
        return wire_session.pack_round(self.round(base, extend))


def spoilt(message: pb.GenerateRequest, true_crc: bool = True, **fields: Any) -> pb.GenerateRequest:
    """With other fields; lists are replaced."""
    spoilt = pb.GenerateRequest()
    spoilt.CopyFrom(message)
    for name, value in fields.items():
        if isinstance(value, list):
            getattr(spoilt.round, name)[:] = value
        else:
            setattr(spoilt.round, name, value)
    if true_crc:
        spoilt.round.crc32 = wire_session.states_checksum(spoilt.round)
    return spoilt


Play = Callable[[ServerHarness, Caller], Awaitable[None]]
HandoffScene = Callable[[Play], ServerHarness]


@pytest.fixture
def scene(checkpoint: Checkpoint, decoder: Decoder, handoff: HandoffBundle) -> HandoffScene:
    def run(play: Play) -> ServerHarness:
        return asyncio.run(
            serve(lambda server: play(server, Caller(server, decoder, handoff)), checkpoint, decoder, handoff)
        )

    return run


def test_a_session_and_its_rounds(scene: HandoffScene) -> None:
    async def play(server: ServerHarness, caller: Caller) -> None:
        for message in (caller.opened(), caller.rounded(extend=0), caller.rounded(base=19)):
            await caller.call.write(message)
        first, second = await read(caller.call), await read(caller.call)
        assert (first.base, first.tokens) == (0, ())
        assert (second.base, second.accepted, len(second.tokens), second.extension) == (19, 0, 1, False)
        await caller.call.done_writing()
        assert await caller.call.read() is grpc.aio.EOF

    assert scene(play).count("OK") == 2


def test_a_hostile_round_is_one_error_and_the_session_goes_on(scene: HandoffScene) -> None:
    async def play(server: ServerHarness, caller: Caller) -> None:
        good = caller.rounded()
        tokens, states = list(good.round.draft), list(good.round.states)
        long = limits.MAX_STATES + 1
        wrong = [
            (Status.INVALID_ARGUMENT, spoilt(good, draft=tokens[1:])),
            (Status.INVALID_ARGUMENT, spoilt(good, states=states[1:])),
            (Status.INVALID_ARGUMENT, spoilt(good, draft=[259, *tokens[1:]])),
            (Status.INVALID_ARGUMENT, spoilt(good, extend=2)),
            (Status.INVALID_ARGUMENT, spoilt(good, base=1 << 31)),
            (Status.INVALID_ARGUMENT, spoilt(good, base=250)),
            (Status.INVALID_ARGUMENT, asked(5, tokens)),
            (Status.OUT_OF_RANGE, spoilt(good, draft=[5] * long, states=[b""] * long)),
            (Status.OUT_OF_RANGE, spoilt(good, states=[bytes(limits.MAX_STATE_BYTES + 1), *states[1:]])),
            (Status.OUT_OF_RANGE, spoilt(good, states=[bytes(161), *states[1:]])),
            (Status.DATA_LOSS, spoilt(good, crc32=1, true_crc=False)),
            (Status.DATA_LOSS, spoilt(good, draft=tokens[::-1], true_crc=False)),
            (Status.DATA_LOSS, spoilt(good, states=states[::-1], true_crc=False)),
            (Status.DATA_LOSS, spoilt(good, states=[states[0], b"\xff" * 150, *states[2:]])),
            (Status.DATA_LOSS, spoilt(good, states=[*states[:-1], b"\x01\x00"])),
        ]
        await caller.call.write(caller.opened())
        for code, message in wrong:
            await caller.call.write(message)
            assert await read_error(caller.call) is code, message
        await caller.call.write(good)
        assert len((await read(caller.call)).tokens) == 1
        await caller.call.done_writing()

    scene(play)


def test_a_hostile_opening_is_one_error_and_the_stream_goes_on(scene: HandoffScene) -> None:
    async def play(server: ServerHarness, caller: Caller) -> None:
        wrong = {
            Status.NOT_FOUND: caller.opened(handoff=12345),
            Status.INVALID_ARGUMENT: caller.opened(rate=2),
            Status.ABORTED: caller.opened(start=7),
            Status.DATA_LOSS: caller.opened(crc32=7),
        }
        for code, message in wrong.items():
            await caller.call.write(message)
            assert await read_error(caller.call) is code
            await caller.call.write(caller.rounded())  # dropped
        for message in (caller.opened(rate=1 << 31), caller.opened(handoff=0, rate=1)):
            await caller.call.write(message)
            assert await read_error(caller.call) is Status.INVALID_ARGUMENT
        await caller.call.write(caller.opened())
        await caller.call.write(caller.rounded())
        assert len((await read(caller.call)).tokens) == 1
        await caller.call.done_writing()
        assert await caller.call.read() is grpc.aio.EOF

    scene(play)


def test_states_in_a_session_of_tokens_are_one_error(scene: HandoffScene) -> None:
    async def play(server: ServerHarness, caller: Caller) -> None:
        for message in (server.opening(), caller.rounded(base=3)):
            await caller.call.write(message)
        assert await read_error(caller.call) is Status.INVALID_ARGUMENT
        await caller.call.write(asked(3))
        assert (await read(caller.call)).base == 3
        await caller.call.done_writing()

    scene(play)


def test_what_is_lost_is_one_error_until_the_stream_opens_again(scene: HandoffScene) -> None:
    async def play(server: ServerHarness, caller: Caller) -> None:
        for message in (caller.opened(), caller.rounded(base=3), caller.rounded(base=4)):
            await caller.call.write(message)
        assert await read_error(caller.call) is Status.ABORTED
        for message in (caller.rounded(base=5), caller.opened(), caller.rounded()):
            await caller.call.write(message)
        assert len((await read(caller.call)).tokens) == 1
        await caller.call.done_writing()
        assert await caller.call.read() is grpc.aio.EOF

    assert scene(play).count("ABORTED") == 1


def test_describe_names_the_handoff(scene: HandoffScene, handoff: HandoffBundle) -> None:
    async def play(server: ServerHarness, caller: Caller) -> None:
        info = wire_describe.unpack_service(await server.stub.Describe(pb.DescribeRequest()))
        assert [model.handoffs for model in info.models] == [(handoff.fingerprint,)]
        await caller.call.done_writing()

    scene(play)


def test_draining_ends_the_stream(scene: HandoffScene) -> None:
    async def play(server: ServerHarness, caller: Caller) -> None:
        for message in (caller.opened(), caller.rounded()):
            await caller.call.write(message)
        await read(caller.call)
        server.servicer.drain()
        assert await read_error(caller.call) is Status.UNAVAILABLE
        assert await caller.call.read() is grpc.aio.EOF

    scene(play)
