"""A replica's faults are not the caller's: every arm asks the next replica, and goes on alone when there is none."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest

from isthmus.edge_agent.config import LanguageConfig
from isthmus.edge_agent.language import agent as module
from isthmus.edge_agent.language.agent import LanguageAgent
from isthmus.edge_agent.language.request import GenerationRequest, Summary, Token
from isthmus.edge_agent.policy.arms import Arm
from isthmus.edge_agent.policy.breaker import BreakerLimits
from isthmus.models.errors import InvalidReply, PayloadCorrupt, PeerError, UnknownBundle, UnsupportedVersion
from isthmus.models.language.checkpoint.checkpoint import Checkpoint
from isthmus.models.messages import Committed, ModelInfo, ServiceInfo, TokenizerInfo
from isthmus.protos import limits, wire_describe, wire_session
from isthmus.protos.isthmus.v1 import isthmus_pb2 as pb
from isthmus.protos.isthmus.v1 import isthmus_pb2_grpc as pb_grpc
from tests.bench.tiny_llama import write_tiny_llama
from tests.tiny_handoff import write_tiny_handoff

PROMPT = (65, 66, 67)
Fault = Callable[[int, Any], pb.GenerateResponse]  # position of a round, context of the call -> the reply


def logprobs(*rows: pb.Logprobs) -> Fault:
    def reply(base: int, context: Any) -> pb.GenerateResponse:
        message = pb.GenerateResponse(base=base, tokens=[1], logprobs=rows)
        message.crc32 = wire_session.reply_checksum(message)
        return message

    return reply


FAULTS: dict[str, Fault] = {
    "a flipped bit": lambda base, context: pb.GenerateResponse(base=base, tokens=[1], crc32=1),
    "an id outside the vocabulary": lambda base, context: wire_session.pack_committed(Committed(base, 0, (1 << 20,))),
    "log-probabilities that are none": logprobs(pb.Logprobs(own=float("nan"))),
    "too many log-probabilities": logprobs(pb.Logprobs(own=-1.0), pb.Logprobs(own=-1.0)),
    "more accepted than drafted": lambda base, context: wire_session.pack_committed(Committed(base, 200, (1,))),
    "another position": lambda base, context: wire_session.pack_committed(Committed(base + 9, 0, (1,))),
    "no token": lambda base, context: wire_session.pack_committed(Committed(base)),
    "another bundle": lambda base, context: wire_session.pack_generate_error(UnknownBundle("another")),
    "another version": lambda base, context: wire_session.pack_generate_error(UnsupportedVersion("another")),
    "a corrupt payload": lambda base, context: wire_session.pack_generate_error(PayloadCorrupt("CRC-32")),
    "a status of the caller's": lambda base, context: context.abort(grpc.StatusCode.INVALID_ARGUMENT, "what?"),
}


class Replica(pb_grpc.IsthmusServicer):
    """Answers every round with the `fault`."""

    def __init__(self, info: ServiceInfo) -> None:
        self._info = info
        self.fault: Fault = FAULTS["no token"]
        self.openings = 0
        self._server = grpc.server(ThreadPoolExecutor(8))
        pb_grpc.add_IsthmusServicer_to_server(self, self._server)
        self.target = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def Generate(self, requests: Iterator[pb.GenerateRequest], context: Any) -> Iterator[pb.GenerateResponse]:
        for request in requests:
            if request.WhichOneof("kind") == "open":
                self.openings += 1
            else:
                yield self.fault(request.round.base, context)

    def Describe(self, request: pb.DescribeRequest, context: Any) -> pb.DescribeResponse:
        return wire_describe.pack_service(self._info)

    def stop(self) -> None:
        self._server.stop(None).wait()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("models") / "tiny", scale=0.3)


@pytest.fixture(scope="module")
def replicas(folder: Path) -> Iterator[tuple[Replica, Replica]]:
    checkpoint = Checkpoint.open(folder)
    own = checkpoint.tokenizer
    tokenizer = TokenizerInfo(own.fingerprint, len(own.to_bytes()), own.vocabulary)
    arms, ends = ("cloud", "verify", "handoff"), tuple(own.eos_ids)
    model = ModelInfo(checkpoint.fingerprint, "tiny", checkpoint.config.vocab, 512, "bitwise", tokenizer, ends, arms)
    made = Replica(info := ServiceInfo("0", limits.WIRE_VERSION, (), (model,))), Replica(info)
    yield made
    for replica in made:
        replica.stop()


@pytest.fixture(scope="module")
def agent(folder: Path, replicas: tuple[Replica, Replica], tmp_path_factory: Any) -> Iterator[LanguageAgent]:
    bundle = write_tiny_handoff(tmp_path_factory.mktemp("handoffs") / "tiny", Checkpoint.open(folder))
    targets = tuple(replica.target for replica in replicas)
    config = LanguageConfig(str(folder), targets, handoff=bundle, agreement=1.0, quality=1.0, context=64, threads=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BREAKER", BreakerLimits(1, 0.02, 0.05))
        made = LanguageAgent(config)
    with made:
        yield made


def said(agent: LanguageAgent, arm: Arm) -> tuple[list[int], Summary]:
    *tokens, summary = agent.generate(GenerationRequest(PROMPT, 3, arm))
    assert isinstance(summary, Summary)
    return [token.id for token in tokens if isinstance(token, Token)], summary


@pytest.mark.parametrize("arm", ["cloud", "verify", "handoff", "auto"])
@pytest.mark.parametrize("fault", FAULTS)
def test_the_next_replica_is_asked_and_then_the_device_goes_on_alone(
    agent: LanguageAgent, replicas: tuple[Replica, Replica], fault: str, arm: Arm
) -> None:
    for replica in replicas:
        replica.fault, replica.openings = FAULTS[fault], 0
    until_all(agent)
    ids, summary = said(agent, arm)
    assert ids == said(agent, "edge")[0]
    assert summary.degraded and "went on with what was committed" in summary.why
    assert all(replica.openings for replica in replicas)


def until_all(agent: LanguageAgent) -> None:
    """The breaker of each link, which the case before has opened, lets requests through again."""
    for _ in range(1000):
        if all(link.state != "open" for link in agent.replicas):
            return
        time.sleep(0.01)
    raise AssertionError("a replica was not found again")


def test_without_a_way_out_the_fault_is_named_as_the_services(folder: Path, replicas: tuple[Replica, Replica]) -> None:
    replicas[0].fault = FAULTS["an id outside the vocabulary"]
    config = LanguageConfig(str(folder), (replicas[0].target,), on_loss="wait", wait_s=5.0, context=64, threads=1)
    with LanguageAgent(config) as waiting, pytest.raises(PeerError) as caught:
        said(waiting, "cloud")
    assert isinstance(caught.value, InvalidReply)
