"""Conversations with a real gRPC server in this process, whose servicer does as each test says."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest

from isthmus.edge_agent.policy.breaker import BreakerLimits
from isthmus.edge_agent.transport.generate_stream import GenerateStream, StreamObservation
from isthmus.edge_agent.transport.link import Link
from isthmus.models.errors import (
    ContextGone,
    DeadlineExceeded,
    InvalidInput,
    IsthmusError,
    LinkDown,
    Overloaded,
    ServiceError,
)
from isthmus.models.messages import Committed, ModelInfo, Opening, Round, ServiceInfo
from isthmus.protos import limits, wire, wire_session
from isthmus.protos.isthmus.v1 import isthmus_pb2 as pb
from isthmus.protos.isthmus.v1 import isthmus_pb2_grpc as pb_grpc

FINGERPRINT = bytes(range(32))
VOCAB = 100
TOKENS = (5, 6, 7)
OPENING = Opening(FINGERPRINT, bytes(16), 0, TOKENS, wire_session.checksum(TOKENS))
ANSWER = Committed(3, 0, (9,), queue_s=0.001, compute_s=0.002, passes=1)

Reaction = Callable[[pb.GenerateRequest, Any], list[pb.GenerateResponse]]


def answers(request: pb.GenerateRequest, context: Any) -> list[pb.GenerateResponse]:
    return [wire_session.pack_committed(ANSWER)] if request.HasField("round") else []


class Servicer(pb_grpc.IsthmusServicer):
    """`react` gives the responses to one message."""

    def __init__(self) -> None:
        self.react: Reaction = answers
        self.requests: list[pb.GenerateRequest] = []
        self.ended = threading.Event()
        self.described = threading.Event()
        self.described.set()

    def Generate(self, requests: Iterator[pb.GenerateRequest], context: Any) -> Iterator[pb.GenerateResponse]:
        context.add_callback(self.ended.set)
        for request in requests:
            self.requests.append(request)
            yield from self.react(request, context)

    def Describe(self, request: pb.DescribeRequest, context: Any) -> pb.DescribeResponse:
        self.described.wait(10)
        info = ModelInfo(FINGERPRINT, "fake", VOCAB, 512, "float32/16")
        return wire.pack_service(ServiceInfo("0", limits.WIRE_VERSION, (), (info,)))


class Cloud:
    def __init__(self) -> None:
        self.servicer = Servicer()
        self.server = grpc.server(ThreadPoolExecutor(8))
        pb_grpc.add_IsthmusServicer_to_server(self.servicer, self.server)
        self.port: int = self.server.add_insecure_port("127.0.0.1:0")
        self.server.start()


@pytest.fixture
def cloud() -> Iterator[Cloud]:
    made = Cloud()
    yield made
    made.servicer.described.set()
    made.server.stop(None).wait()


@pytest.fixture
def link(cloud: Cloud) -> Iterator[Link]:
    made = Link(f"127.0.0.1:{cloud.port}", FINGERPRINT, (VOCAB,), breaker=BreakerLimits(1, 0.05, 0.1))
    assert made.wait_probed(10)
    yield made
    made.close()


@pytest.fixture
def on_reply() -> list[StreamObservation | IsthmusError]:
    return []


@pytest.fixture
def conversation(link: Link, on_reply: list[StreamObservation | IsthmusError]) -> Iterator[GenerateStream]:
    made = GenerateStream(link._stub, VOCAB, on_reply.append)
    yield made
    made.close()


def until(condition: Callable[[], bool]) -> None:
    for _ in range(1000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it did not come to pass")


def size(message: Any) -> int:
    return int(message.ByteSize()) + 5


def test_what_is_said_arrives_in_order_and_its_bytes_are_counted(
    cloud: Cloud, conversation: GenerateStream, on_reply: list[Any]
) -> None:
    rounds = [Round(3), Round(4, (8, 9), 2)]
    conversation.open(OPENING)
    conversation.send(rounds[0])
    assert conversation.receive(5) == ANSWER
    conversation.send(rounds[1])
    assert conversation.receive(5) == ANSWER
    sent = [wire_session.pack_opening(OPENING), *map(wire_session.pack_round, rounds)]
    assert cloud.servicer.requests == sent
    assert conversation.bytes_up == sum(map(size, sent))
    assert conversation.opening_bytes == size(sent[0])
    assert conversation.bytes_down == 2 * size(wire_session.pack_committed(ANSWER))
    assert [reply.up_bytes for reply in on_reply] == [size(sent[0]) + size(sent[1]), size(sent[2])]


def test_time_on_the_way_is_known_only_of_a_round_that_went_alone(
    cloud: Cloud, conversation: GenerateStream, on_reply: list[Any]
) -> None:
    stale, extension = Committed(3), Committed(4, 0, (9,), extension=True)
    slow = Committed(3, 0, (9,), queue_s=100.0)
    said = iter([[], [], [ANSWER, ANSWER], [stale], [ANSWER, extension], [slow]])
    cloud.servicer.react = lambda request, context: [wire_session.pack_committed(one) for one in next(said)]
    conversation.open(OPENING)
    for count in (2, 1, 2, 1):
        conversation.send(Round(3))
        if count == 2 and not on_reply:
            conversation.send(Round(3))
        for _ in range(count):
            conversation.receive(5)
    known = [reply.elapsed_s is not None for reply in on_reply]
    assert known == [False, True, False, True, False, True]  # behind another one; alone; stale; alone; extension; alone
    assert on_reply[-1].elapsed_s == 0.0  # the cloud's clock cannot make it negative
    assert all(0 <= reply.elapsed_s < 5 for reply in on_reply if reply.elapsed_s is not None)


def test_poll_gives_what_is_there_and_never_waits(cloud: Cloud, conversation: GenerateStream) -> None:
    release = threading.Event()
    cloud.servicer.react = lambda request, context: (release.wait(10) and answers(request, context)) or []
    conversation.open(OPENING)
    conversation.send(Round(3))
    assert conversation.poll() is None
    with pytest.raises(DeadlineExceeded, match="0.1 s"):
        conversation.receive(0.05)
    release.set()
    found: list[Committed | None] = []
    until(lambda: found.append(conversation.poll()) or found[-1] is not None)  # type: ignore[func-returns-value]
    assert found[-1] == ANSWER


@pytest.mark.parametrize("error", [ContextGone, Overloaded, InvalidInput])
def test_an_error_in_an_answer_is_raised_and_the_conversation_goes_on(
    cloud: Cloud, conversation: GenerateStream, on_reply: list[Any], error: type[IsthmusError]
) -> None:
    cloud.servicer.react = lambda request, context: [wire_session.pack_generate_error(error("so it is"))]
    conversation.open(OPENING)
    with pytest.raises(error, match="so it is"):
        conversation.receive(5)
    cloud.servicer.react = lambda request, context: []
    conversation.send(Round(3))  # on its way when the opening failed: it is never answered
    until(lambda: len(cloud.servicer.requests) == 2)
    cloud.servicer.react = answers
    conversation.open(OPENING)
    conversation.send(Round(3))
    assert conversation.receive(5) == ANSWER
    (reply,) = on_reply
    assert reply.up_bytes == size(wire_session.pack_opening(OPENING)) + size(wire_session.pack_round(Round(3)))
    assert reply.elapsed_s is not None
    assert conversation.opening_bytes == 2 * size(wire_session.pack_opening(OPENING))


@pytest.mark.parametrize(
    "response",
    [
        wire_session.pack_committed(Committed(3, 0, (VOCAB,))),
        wire_session.pack_committed(Committed(3, limits.MAX_DRAFT + 1)),
        pb.GenerateResponse(base=3, tokens=[1], logprobs=[pb.Logprobs(own=float("nan"))]),
    ],
    ids=["token", "accepted", "nan"],
)
def test_a_cloud_that_talks_nonsense_is_not_believed(
    cloud: Cloud, conversation: GenerateStream, on_reply: list[Any], response: pb.GenerateResponse
) -> None:
    cloud.servicer.react = lambda request, context: [response]
    conversation.open(OPENING)
    with pytest.raises(InvalidInput):
        conversation.receive(5)
    assert on_reply == []


@pytest.mark.parametrize(
    ("code", "error"),
    [
        (grpc.StatusCode.UNAVAILABLE, LinkDown),
        (grpc.StatusCode.INTERNAL, ServiceError),
        (grpc.StatusCode.DEADLINE_EXCEEDED, LinkDown),  # of an answer they say: go on; no stream does
        (grpc.StatusCode.ABORTED, LinkDown),
    ],
)
def test_the_streams_failure_is_raised_again_and_again_and_heard_once(
    cloud: Cloud, conversation: GenerateStream, on_reply: list[Any], code: Any, error: type[IsthmusError]
) -> None:
    cloud.servicer.react = lambda request, context: context.abort(code, "so it is")
    conversation.open(OPENING)
    for use in (lambda: conversation.receive(5), conversation.poll, lambda: conversation.send(Round(3))):
        with pytest.raises(error, match="so it is"):
            use()
    assert [type(reply) for reply in on_reply] == [error]


def test_what_came_before_a_failure_is_not_lost_with_it(
    cloud: Cloud, conversation: GenerateStream, on_reply: list[Any]
) -> None:
    conversation.open(OPENING)
    assert not conversation.answered
    conversation.send(Round(3))
    until(lambda: conversation.answered)
    cloud.server.stop(None).wait()
    until(lambda: conversation._incoming.qsize() == 2)
    assert on_reply == []
    assert conversation.receive(5) == ANSWER
    with pytest.raises(LinkDown):
        conversation.poll()
    assert conversation.answered, "nobody need wait for what has failed"
    assert [type(reply) for reply in on_reply] == [StreamObservation, LinkDown]


def test_an_answer_that_is_taken_late_says_nothing_bad_of_the_link(
    cloud: Cloud, conversation: GenerateStream, on_reply: list[Any]
) -> None:
    conversation.open(OPENING)
    conversation.send(Round(3))
    until(lambda: conversation.answered)
    time.sleep(2.0)
    conversation.receive(5)
    assert on_reply[-1].elapsed_s < 2.0


def test_a_stream_that_the_cloud_ends_is_link_down() -> None:
    class Ending(Servicer):
        def Generate(self, requests: Iterator[pb.GenerateRequest], context: Any) -> Iterator[pb.GenerateResponse]:
            yield wire_session.pack_committed(ANSWER)

    server = grpc.server(ThreadPoolExecutor(2))
    pb_grpc.add_IsthmusServicer_to_server(Ending(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    other = Link(f"127.0.0.1:{port}", FINGERPRINT, (VOCAB,))
    conversation = GenerateStream(other._stub, VOCAB, lambda reply: None)
    assert conversation.receive(5) == ANSWER
    with pytest.raises(LinkDown, match="ended the stream"):
        conversation.receive(5)
    other.close()
    server.stop(None).wait()


def test_closing_ends_the_call_in_the_cloud_and_is_no_failure(
    cloud: Cloud, conversation: GenerateStream, on_reply: list[Any]
) -> None:
    conversation.open(OPENING)
    conversation.send(Round(3))
    conversation.receive(5)
    assert not cloud.servicer.ended.is_set()
    conversation.close()
    assert cloud.servicer.ended.wait(10)
    until(lambda: conversation._incoming.qsize() == 1)
    assert len(on_reply) == 1  # the answer; nobody took the end
    until(lambda: "isthmus-conversation" not in [thread.name for thread in threading.enumerate()])


def test_closing_stops_a_cloud_that_is_at_work(cloud: Cloud, conversation: GenerateStream) -> None:
    release = threading.Event()
    cloud.servicer.react = lambda request, context: (release.wait(10) and []) or []
    conversation.open(OPENING)
    until(lambda: len(cloud.servicer.requests) == 1)
    conversation.close()
    try:
        assert cloud.servicer.ended.wait(5)
    finally:
        release.set()


def test_a_conversation_teaches_its_link(cloud: Cloud, link: Link) -> None:
    assert link.state == "half_open"
    talk = link.open_generate_stream()
    talk.open(OPENING)
    talk.send(Round(3))
    assert talk.receive(5) == ANSWER
    assert link.state == "closed"
    cloud.servicer.react = lambda request, context: context.abort(grpc.StatusCode.UNAVAILABLE, "gone")
    cloud.servicer.described.clear()
    talk.send(Round(4))
    with pytest.raises(LinkDown):
        talk.receive(5)
    assert link.state == "open"
    with pytest.raises(LinkDown, match="gone"):
        link.open_generate_stream()
    talk.close()
    cloud.servicer.described.set()
    until(lambda: link.state == "half_open")
    cloud.servicer.react = answers
    link.open_generate_stream().close()


def test_a_link_that_is_told_of_a_failure_leaves_the_cloud_alone_until_a_probe(cloud: Cloud, link: Link) -> None:
    cloud.servicer.described.clear()
    link.record_failure("it is full")
    assert link.state == "open"
    with pytest.raises(LinkDown, match="full"):
        link.open_generate_stream()
    cloud.servicer.described.set()
    until(lambda: link.state == "half_open")


def test_alive_is_a_question_to_the_cloud_now(cloud: Cloud, link: Link) -> None:
    assert link.alive(5)
    cloud.servicer.described.clear()
    assert not link.alive(0.1)
    cloud.servicer.described.set()
    assert link.alive(5)
    cloud.server.stop(None).wait()
    assert not link.alive(5)
