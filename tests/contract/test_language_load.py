"""Peers of one real service: a heavy neighbour, and a device that is gone before its prompt is computed."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from queue import Queue

import grpc
import pytest

from isthmus.models.language.checkpoint.checkpoint import Checkpoint
from isthmus.models.messages import Opening, Round
from isthmus.protos import wire_session
from isthmus.protos.isthmus.v1 import isthmus_pb2 as pb
from isthmus.protos.isthmus.v1 import isthmus_pb2_grpc as pb_grpc
from tests.bench.processes import CloudProcess
from tests.contract.conftest import LANGUAGE
from tests.contract.language_parts import until

LONG = (5,) * 500
STEPS = "decoder_pass_seconds_count"


@pytest.fixture(scope="module")
def cloud(endless_llama: Path) -> Iterator[CloudProcess]:
    """Steps of two tokens, so that a prompt takes 250, and memory for four such prompts."""
    with CloudProcess(
        arguments=("--model", str(endless_llama), *LANGUAGE, "--width", "2", "--context-mb", "1")
    ) as process:
        yield process


@pytest.fixture(scope="module")
def model(endless_llama: Path) -> bytes:
    return Checkpoint.open(endless_llama).fingerprint


class Stream:
    """A stream with one session."""

    def __init__(
        self, channel: grpc.Channel, model: bytes, tokens: tuple[int, ...], logprobs: int | None = None
    ) -> None:
        self.outgoing: Queue[pb.GenerateRequest | None] = Queue()
        self.call = pb_grpc.IsthmusStub(channel).Generate(iter(self.outgoing.get, None))  # type: ignore[no-untyped-call]
        opening = Opening(model, os.urandom(16), 0, tokens, wire_session.checksum(tokens))
        self.outgoing.put(wire_session.pack_opening(opening))
        self.base = len(tokens)

    def ask(self, extend: int = 0) -> None:
        self.outgoing.put(wire_session.pack_round(Round(self.base, (), extend)))

    def close(self) -> None:
        self.outgoing.put(None)
        self.call.cancel()


def peer(cloud: CloudProcess) -> grpc.Channel:
    """A connection of its own."""
    return grpc.insecure_channel(cloud.target, [("grpc.use_local_subchannel_pool", 1)])


def until_steady(cloud: CloudProcess) -> None:
    """No step follows the last one."""
    steps = -1.0

    def steady() -> bool:
        nonlocal steps
        former, steps = steps, cloud.metric(STEPS)
        return steps == former

    until(steady)


def test_a_neighbour_with_many_prompts_does_not_delay_another_peer(cloud: CloudProcess, model: bytes) -> None:
    answered: list[str] = []

    def read(name: str, stream: Stream) -> None:
        next(stream.call)
        answered.append(name)

    with peer(cloud) as neighbour, peer(cloud) as other:
        started = cloud.metric(STEPS)
        streams = [Stream(neighbour, model, LONG) for _ in range(12)]
        for stream in streams:
            stream.ask()
        until(lambda: cloud.metric(STEPS) > started + 10)
        one = Stream(other, model, (7,) * 20)
        one.ask()
        readers = [threading.Thread(target=read, args=("many", stream)) for stream in streams]
        readers.append(threading.Thread(target=read, args=("one", one)))
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join(60)
        assert len(answered) == 13
        assert answered.index("one") <= 2
        for stream in (*streams, one):
            stream.close()


@pytest.mark.parametrize("half_closed", [False, True])
def test_the_prompt_of_a_device_that_is_gone_ends(cloud: CloudProcess, model: bytes, half_closed: bool) -> None:
    with peer(cloud) as channel:
        before = cloud.metric(STEPS)
        streams = [Stream(channel, model, LONG) for _ in range(16)]
        for stream in streams:
            stream.ask(extend=10)
            if half_closed:
                stream.outgoing.put(None)
        until(lambda: cloud.metric(STEPS) > before + 10)
    until_steady(cloud)
    assert cloud.metric(STEPS) - before < 16 * len(LONG) / 2
