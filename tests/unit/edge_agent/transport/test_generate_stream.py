"""`Generate` streams to a real gRPC server in this process; each test sets how its servicer reacts."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest

from isthmus.edge_agent.policy.breaker import BreakerLimits
from isthmus.edge_agent.transport import generate_stream as module
from isthmus.edge_agent.transport.generate_stream import GenerateStream, StreamObservation
from isthmus.edge_agent.transport.language_link import LanguageLink
from isthmus.edge_agent.transport.link import HeldBundle
from isthmus.models.errors import (
    AgentClosed,
    ContextGone,
    DeadlineExceeded,
    InvalidInput,
    InvalidReply,
    IsthmusError,
    LinkDown,
    Overloaded,
    PeerError,
    ServiceError,
)
from isthmus.models.messages import Committed, Logprobs, ModelInfo, Opening, Round, ServiceInfo, TokenizerInfo
from isthmus.protos import limits, wire_describe, wire_session
from isthmus.protos.isthmus.v1 import isthmus_pb2 as pb
from isthmus.protos.isthmus.v1 import isthmus_pb2_grpc as pb_grpc

FINGERPRINT = bytes(range(32))
VOCAB = 100
TOKENIZER = TokenizerInfo(FINGERPRINT, 1, FINGERPRINT)
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
        info = ModelInfo(FINGERPRINT, "fake", VOCAB, 512, "bitwise", TOKENIZER, (0,), ("cloud", "verify"))
        return wire_describe.pack_service(ServiceInfo("0", limits.WIRE_VERSION, (), (info,)))


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
def link(cloud: Cloud) -> Iterator[LanguageLink]:
    made = LanguageLink(f"127.0.0.1:{cloud.port}", HeldBundle(FINGERPRINT), None, BreakerLimits(1, 0.05, 0.1))
    assert made.wait_probed(10)
    yield made
    made.close()


@pytest.fixture
def observed() -> list[StreamObservation | IsthmusError]:
    return []


@pytest.fixture
def stream(link: LanguageLink, observed: list[StreamObservation | IsthmusError]) -> Iterator[GenerateStream]:
    made = GenerateStream(link._stub, VOCAB, observed.append)
    yield made
    made.close()


def until(condition: Callable[[], bool]) -> None:
    for _ in range(1000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("the condition did not come true")


def size(message: Any) -> int:
    return int(message.ByteSize()) + 5


def test_messages_arrive_in_order_and_their_bytes_are_counted(
    cloud: Cloud, stream: GenerateStream, observed: list[Any]
) -> None:
    rounds = [Round(3), Round(4, (8, 9), 2)]
    stream.open(OPENING)
    stream.send(rounds[0])
    assert stream.receive(5) == ANSWER
    stream.send(rounds[1])
    assert stream.receive(5) == ANSWER
    sent = [wire_session.pack_opening(OPENING), *map(wire_session.pack_round, rounds)]
    assert cloud.servicer.requests == sent
    assert stream.bytes_up == sum(map(size, sent))
    assert stream.opening_bytes == size(sent[0])
    assert stream.bytes_down == 2 * size(wire_session.pack_committed(ANSWER))
    assert [reply.up_bytes for reply in observed] == [size(sent[0]) + size(sent[1]), size(sent[2])]


class Clock:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def monotonic(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(module, "time", made)
    return made


def test_transit_time_is_known_only_of_a_round_that_was_sent_alone(
    cloud: Cloud, stream: GenerateStream, observed: list[Any], clock: Clock
) -> None:
    """Every message that is answered takes a second on the way, of which the cloud says that it spent a part."""
    stale, extension = Committed(3), Committed(4, 0, (9,), extension=True)
    slow = Committed(3, 0, (9,), queue_s=100.0)
    replies = iter([[], [], [ANSWER, ANSWER], [stale], [ANSWER, extension], [slow]])

    def react(request: pb.GenerateRequest, context: Any) -> list[pb.GenerateResponse]:
        committed = next(replies)
        clock.now_s += 1.0 if committed else 0.0
        return [wire_session.pack_committed(one) for one in committed]

    cloud.servicer.react = react
    stream.open(OPENING)
    for count in (2, 1, 2, 1):
        stream.send(Round(3))
        if count == 2 and not observed:
            stream.send(Round(3))
        for _ in range(count):
            stream.receive(5)
    alone_s = pytest.approx(1.0 - ANSWER.queue_s - ANSWER.compute_s)
    # after another one; alone; stale; alone; extension; alone, and the cloud's clock cannot make it negative
    assert [reply.elapsed_s for reply in observed] == [None, alone_s, None, alone_s, None, 0.0]


def test_poll_returns_what_has_arrived_and_never_waits(cloud: Cloud, stream: GenerateStream) -> None:
    release = threading.Event()
    cloud.servicer.react = lambda request, context: (release.wait(10) and answers(request, context)) or []
    stream.open(OPENING)
    stream.send(Round(3))
    assert stream.poll() is None
    with pytest.raises(DeadlineExceeded, match="0.1 s"):
        stream.receive(0.05)
    release.set()
    found: list[Committed | None] = []
    until(lambda: found.append(stream.poll()) or found[-1] is not None)  # type: ignore[func-returns-value]
    assert found[-1] == ANSWER


@pytest.mark.parametrize("error", [ContextGone, Overloaded, InvalidInput])
def test_an_error_in_a_reply_is_raised_and_the_stream_goes_on(
    cloud: Cloud, stream: GenerateStream, observed: list[Any], error: type[IsthmusError]
) -> None:
    cloud.servicer.react = lambda request, context: [wire_session.pack_generate_error(error("the reason"))]
    stream.open(OPENING)
    with pytest.raises(error, match="the reason"):
        stream.receive(5)
    cloud.servicer.react = lambda request, context: []
    stream.send(Round(3))  # in transit when the opening failed: it is never answered
    until(lambda: len(cloud.servicer.requests) == 2)
    cloud.servicer.react = answers
    stream.open(OPENING)
    stream.send(Round(3))
    assert stream.receive(5) == ANSWER
    (reply,) = observed
    assert reply.up_bytes == size(wire_session.pack_opening(OPENING)) + size(wire_session.pack_round(Round(3)))
    assert reply.elapsed_s is not None
    assert stream.opening_bytes == 2 * size(wire_session.pack_opening(OPENING))


@pytest.mark.parametrize(
    "response",
    [
        wire_session.pack_committed(Committed(3, 0, (VOCAB,))),
        wire_session.pack_committed(Committed(3, limits.MAX_SCORED + 1)),
        wire_session.pack_committed(Committed(3, 0, (1,), logprobs=(Logprobs(float("nan")),))),
    ],
    ids=["token", "accepted", "nan"],
)
def test_impossible_replies_are_refused(
    cloud: Cloud, stream: GenerateStream, observed: list[Any], response: pb.GenerateResponse
) -> None:
    cloud.servicer.react = lambda request, context: [response]
    stream.open(OPENING)
    with pytest.raises(InvalidReply):
        stream.receive(5)
    assert observed == []


@pytest.mark.parametrize(
    ("code", "error"),
    [
        (grpc.StatusCode.UNAVAILABLE, LinkDown),
        (grpc.StatusCode.INTERNAL, ServiceError),
        (
            grpc.StatusCode.DEADLINE_EXCEEDED,
            LinkDown,
        ),  # in a reply these mean that the stream goes on; as its end they do not
        (grpc.StatusCode.ABORTED, LinkDown),
        (grpc.StatusCode.INVALID_ARGUMENT, PeerError),
        (grpc.StatusCode.DATA_LOSS, PeerError),
    ],
)
def test_the_failure_of_a_stream_is_raised_by_every_call_and_reported_once(
    cloud: Cloud, stream: GenerateStream, observed: list[Any], code: Any, error: type[IsthmusError]
) -> None:
    cloud.servicer.react = lambda request, context: context.abort(code, "the reason")
    stream.open(OPENING)
    for use in (lambda: stream.receive(5), stream.poll, lambda: stream.send(Round(3))):
        with pytest.raises(error, match="the reason"):
            use()
    assert [type(reply) for reply in observed] == [error]


def test_a_reply_that_came_before_a_failure_is_not_lost(
    cloud: Cloud, stream: GenerateStream, observed: list[Any]
) -> None:
    stream.open(OPENING)
    assert not stream.answered
    stream.send(Round(3))
    until(lambda: stream.answered)
    cloud.server.stop(None).wait()
    until(lambda: stream._incoming.qsize() == 2)
    assert observed == []
    assert stream.receive(5) == ANSWER
    with pytest.raises(LinkDown):
        stream.poll()
    assert stream.answered, "a failure needs no waiting"
    assert [type(reply) for reply in observed] == [StreamObservation, LinkDown]


def test_a_reply_that_is_received_late_does_not_count_against_the_link(
    cloud: Cloud, stream: GenerateStream, observed: list[Any], clock: Clock
) -> None:
    stream.open(OPENING)
    stream.send(Round(3))
    until(lambda: stream.answered)
    clock.now_s += 50.0
    stream.receive(5)
    assert [reply.elapsed_s for reply in observed] == [0.0], "it arrived before the clock moved"


def test_a_stream_that_the_cloud_ends_is_link_down() -> None:
    class Ending(Servicer):
        def Generate(self, requests: Iterator[pb.GenerateRequest], context: Any) -> Iterator[pb.GenerateResponse]:
            yield wire_session.pack_committed(ANSWER)

    server = grpc.server(ThreadPoolExecutor(2))
    pb_grpc.add_IsthmusServicer_to_server(Ending(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    other = LanguageLink(f"127.0.0.1:{port}", HeldBundle(FINGERPRINT))
    stream = GenerateStream(other._stub, VOCAB, lambda reply: None)
    assert stream.receive(5) == ANSWER
    with pytest.raises(LinkDown, match="ended the stream"):
        stream.receive(5)
    other.close()
    server.stop(None).wait()


def test_closing_ends_the_call_in_the_cloud_and_is_not_reported_as_a_failure(
    cloud: Cloud, stream: GenerateStream, observed: list[Any]
) -> None:
    stream.open(OPENING)
    stream.send(Round(3))
    stream.receive(5)
    assert not cloud.servicer.ended.is_set()
    stream.close()
    assert cloud.servicer.ended.wait(10)
    until(lambda: stream._incoming.qsize() == 1)
    assert len(observed) == 1  # the reply; the end was not received
    until(lambda: "isthmus-generate-stream" not in [thread.name for thread in threading.enumerate()])


def test_closing_cancels_a_call_that_the_cloud_works_on(cloud: Cloud, stream: GenerateStream) -> None:
    release = threading.Event()
    cloud.servicer.react = lambda request, context: (release.wait(10) and []) or []
    stream.open(OPENING)
    until(lambda: len(cloud.servicer.requests) == 1)
    stream.close()
    try:
        assert cloud.servicer.ended.wait(5)
    finally:
        release.set()


def test_a_stream_updates_the_breaker_of_its_link(cloud: Cloud, link: LanguageLink) -> None:
    assert link.state == "half_open"
    opened = link.open_generate_stream(VOCAB)
    opened.open(OPENING)
    opened.send(Round(3))
    assert opened.receive(5) == ANSWER
    assert link.state == "closed"
    cloud.servicer.react = lambda request, context: context.abort(grpc.StatusCode.UNAVAILABLE, "gone")
    cloud.servicer.described.clear()
    opened.send(Round(4))
    with pytest.raises(LinkDown):
        opened.receive(5)
    assert link.state == "open"
    with pytest.raises(LinkDown, match="gone"):
        link.open_generate_stream(VOCAB)
    opened.close()
    cloud.servicer.described.set()
    until(lambda: link.state == "half_open")
    cloud.servicer.react = answers
    link.open_generate_stream(VOCAB).close()


def test_a_recorded_failure_opens_the_breaker_until_a_probe(cloud: Cloud, link: LanguageLink) -> None:
    cloud.servicer.described.clear()
    link.record_failure("it is full")
    assert link.state == "open"
    with pytest.raises(LinkDown, match="full"):
        link.open_generate_stream(VOCAB)
    cloud.servicer.described.set()
    until(lambda: link.state == "half_open")


def test_a_stream_updates_the_estimate_of_its_link(
    link: LanguageLink, monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    sizes: list[int] = []
    monkeypatch.setattr(link._health._estimator, "observe", lambda up_bytes, seconds, now_s: sizes.append(up_bytes))
    opened = link.open_generate_stream(VOCAB)
    opened.open(OPENING)
    opened.send(Round(3))
    opened.receive(5)
    opened.close()
    assert sizes == [opened.bytes_up]


def test_alive_asks_the_cloud_at_once(cloud: Cloud, link: LanguageLink) -> None:
    assert link.alive(5)
    cloud.servicer.described.clear()
    assert not link.alive(0.1)
    cloud.servicer.described.set()
    assert link.alive(5)
    cloud.server.stop(None).wait()
    assert not link.alive(5)


def test_an_idle_stream_is_half_closed_and_what_is_sent_later_says_so(
    cloud: Cloud, link: LanguageLink, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = link.open_generate_stream(VOCAB)
    opened.open(OPENING)
    opened.send(Round(3))
    monkeypatch.setattr(limits, "IDLE_STREAM_S", 0.0)
    assert opened.receive(5) == ANSWER
    link._retire_idle()
    assert opened.retired and cloud.servicer.ended.wait(5)
    with pytest.raises(ContextGone, match="was idle"):
        opened.send(Round(4))
    assert link.state == "closed"


def test_a_stream_over_which_something_is_due_stays_open(cloud: Cloud, link: LanguageLink, monkeypatch: Any) -> None:
    cloud.servicer.react = lambda request, context: []
    monkeypatch.setattr(limits, "IDLE_STREAM_S", 0.0)
    opened = link.open_generate_stream(VOCAB)
    opened.open(OPENING)
    opened.send(Round(3))
    link._retire_idle()
    assert not opened.retired
    cloud.servicer.react = answers
    opened.open(OPENING)
    opened.send(Round(3, extend=2))
    assert opened.receive(5) == ANSWER
    link._retire_idle()
    assert not opened.retired, "two more tokens are due"
    opened.close()


def test_a_stream_after_close_is_a_clear_error(cloud: Cloud) -> None:
    link = LanguageLink(f"127.0.0.1:{cloud.port}", HeldBundle(FINGERPRINT))
    assert link.wait_probed(10)
    link.close()
    with pytest.raises(AgentClosed, match="was closed"):
        link.open_generate_stream(VOCAB)
