"""The link against a real gRPC server in this process; each test sets how its servicer reacts."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest

from isthmus.edge_agent.policy.breaker import BreakerLimits
from isthmus.edge_agent.transport import exchanges, health
from isthmus.edge_agent.transport.infer_stream import InferStream
from isthmus.edge_agent.transport.link import Link
from isthmus.models.errors import (
    AgentClosed,
    DeadlineExceeded,
    Draining,
    InvalidReply,
    IsthmusError,
    LinkDown,
    Overloaded,
    PayloadCorrupt,
    PayloadTooLarge,
    ServiceError,
    UnknownBundle,
    UnsupportedVersion,
)
from isthmus.models.messages import BundleInfo, CloudReply, Codec, Payload, ServiceInfo, TapInfo, TaskInfo
from isthmus.protos import limits, wire, wire_describe
from isthmus.protos.isthmus.v1 import isthmus_pb2 as pb
from isthmus.protos.isthmus.v1 import isthmus_pb2_grpc as pb_grpc

FINGERPRINT = bytes(range(32))
PAYLOAD = Payload(Codec.BOTTLENECK, 0, 0, b"\x01\x02\x03\x04")
ANSWER = CloudReply(((0.25, 0.75),), 0.001, 0.002)
FAST = BreakerLimits(failures=3, first_s=0.05, last_s=0.1)

Reaction = Callable[[pb.InferRequest], list[pb.InferResponse]]


def good(request: pb.InferRequest) -> list[pb.InferResponse]:
    return [wire.pack_answer(request.request_id, ANSWER)]


class Servicer(pb_grpc.IsthmusServicer):
    """`react` gives the responses to one request; raising ends the stream."""

    def __init__(self) -> None:
        self.react: Reaction = good
        self.fingerprint = FINGERPRINT
        self.requests: list[pb.InferRequest] = []
        self.streams = self.ended = 0
        self.goodbyes = 0  # requests to answer with the end of their stream
        self.described = threading.Event()
        self.described.set()

    def InferStream(self, requests: Iterator[pb.InferRequest], context: Any) -> Iterator[pb.InferResponse]:
        self.streams += 1
        for request in requests:
            self.requests.append(request)
            if self.goodbyes:
                self.goodbyes -= 1
                context.abort(grpc.StatusCode.UNAVAILABLE, "GOAWAY received; too_many_pings")
            yield from self.react(request)
        self.ended += 1

    def Describe(self, request: pb.DescribeRequest, context: Any) -> pb.DescribeResponse:
        self.described.wait(10)
        info = BundleInfo(
            self.fingerprint, "fake", (TaskInfo("defect", 2), TaskInfo("colour", 3)), (TapInfo("light", 1),)
        )
        return wire_describe.pack_service(ServiceInfo("0", limits.WIRE_VERSION, (info,)))


class Cloud:
    def __init__(self, port: int = 0) -> None:
        self.servicer = Servicer()
        self.server = grpc.server(ThreadPoolExecutor(8))
        pb_grpc.add_IsthmusServicer_to_server(self.servicer, self.server)
        self.port: int = self.server.add_insecure_port(f"127.0.0.1:{port}")
        self.server.start()


@pytest.fixture
def cloud() -> Iterator[Cloud]:
    made = Cloud()
    yield made
    made.servicer.described.set()
    made.server.stop(None).wait()


@pytest.fixture
def late() -> list[int]:
    return []


@pytest.fixture
def link(cloud: Cloud, late: list[int]) -> Iterator[Link]:
    made = Link(f"127.0.0.1:{cloud.port}", FINGERPRINT, (2, 3), breaker=FAST, late=lambda: late.append(1))
    assert made.wait_probed(10)
    yield made
    made.close()


def until(condition: Callable[[], bool]) -> None:
    for _ in range(1000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("the condition did not come true")


def test_a_reply_comes_with_its_bytes_and_one_stream_is_kept(cloud: Cloud, link: Link) -> None:
    exchanges = [link.infer(PAYLOAD, 5.0) for _ in range(3)]
    assert [exchange.reply.probabilities for exchange in exchanges] == [((0.25, 0.75),)] * 3
    assert exchanges[0].up_bytes == cloud.servicer.requests[0].ByteSize() + 5
    assert cloud.servicer.streams == 1
    assert link.state == "closed"


def test_the_clouds_own_time_is_no_part_of_the_links(cloud: Cloud, link: Link, monkeypatch: pytest.MonkeyPatch) -> None:
    observed: list[tuple[int, float]] = []
    monkeypatch.setattr(
        link._health._estimator,
        "observe",
        lambda up_bytes, seconds, now_s, **sizes: observed.append((up_bytes, seconds)),
    )
    reply = CloudReply(((0.25, 0.75),), queue_s=64.0, compute_s=32.0)
    cloud.servicer.react = lambda request: [wire.pack_answer(request.request_id, reply)]
    exchange = link.infer(PAYLOAD, 5.0)
    assert observed == [(exchange.up_bytes, exchange.elapsed_s - 96.0)]


@pytest.mark.parametrize(
    ("tasks", "probabilities"),
    [((0,), ((0.25, 0.75),)), ((1,), ((0.5, 0.25, 0.25),)), ((0, 1), ((0.25, 0.75), (0.5, 0.25, 0.25)))],
)
def test_each_task_requested_has_its_own_answer(
    cloud: Cloud, link: Link, tasks: tuple[int, ...], probabilities: tuple[tuple[float, ...], ...]
) -> None:
    cloud.servicer.react = lambda request: [wire.pack_answer(request.request_id, CloudReply(probabilities, 0, 0))]
    assert link.infer(PAYLOAD, 5.0, tasks).reply.probabilities == probabilities
    assert wire.unpack_request(cloud.servicer.requests[0]).tasks == tasks


@pytest.mark.parametrize("probabilities", [((0.25, 0.75),), ((0.2, 0.3, 0.5),), ((0.5, 0.25, 0.25), (0.25, 0.75))])
def test_answers_to_other_tasks_than_requested_are_refused(
    cloud: Cloud, link: Link, probabilities: tuple[tuple[float, ...], ...]
) -> None:
    cloud.servicer.react = lambda request: [wire.pack_answer(request.request_id, CloudReply(probabilities, 0, 0))]
    with pytest.raises(InvalidReply):
        link.infer(PAYLOAD, 5.0, (0, 1))


def test_request_ids_wrap_around_before_they_cost_more_bytes(cloud: Cloud, link: Link) -> None:
    link._exchanges._next_id = limits.MAX_REQUEST_ID - 1
    for _ in range(2):
        link.infer(PAYLOAD, 5.0)
    assert [request.request_id for request in cloud.servicer.requests] == [limits.MAX_REQUEST_ID, 1]


def test_responses_reach_their_requests_in_any_order(cloud: Cloud, link: Link) -> None:
    link.infer(PAYLOAD, 5.0)  # closes the breaker, so that two requests may run at once
    held: list[pb.InferRequest] = []

    def second_first(request: pb.InferRequest) -> list[pb.InferResponse]:
        held.append(request)
        if len(held) < 2:
            return []
        answers = [CloudReply(((share, 1 - share),), 0, 0) for share in (0.25, 0.5)]
        pairs = zip(sorted(held, key=lambda r: len(r.payload)), answers, strict=True)
        return [wire.pack_answer(request.request_id, answer) for request, answer in pairs][::-1]

    cloud.servicer.react = second_first
    with ThreadPoolExecutor(2) as threads:
        payloads = [Payload(Codec.BOTTLENECK, 0, 0, bytes(size)) for size in (4, 8)]
        exchanges = list(threads.map(lambda payload: link.infer(payload, 5.0), payloads))
    assert [exchange.reply.probabilities[0][0] for exchange in exchanges] == [0.25, 0.5]


def test_an_error_response_is_raised_as_its_class_and_trips_no_breaker(cloud: Cloud, link: Link) -> None:
    cloud.servicer.react = lambda request: [wire.pack_error(request.request_id, PayloadCorrupt("flipped"))]
    for _ in range(5):
        with pytest.raises(PayloadCorrupt, match="flipped"):
            link.infer(PAYLOAD, 5.0)
    assert link.state == "closed"


def test_a_late_response_is_counted_and_dropped(cloud: Cloud, link: Link, late: list[int]) -> None:
    release = threading.Event()

    def slow(request: pb.InferRequest) -> list[pb.InferResponse]:
        release.wait(10)
        return good(request)

    link.infer(PAYLOAD, 5.0)
    cloud.servicer.react = slow
    with pytest.raises(DeadlineExceeded, match="50 ms"):
        link.infer(PAYLOAD, 0.05)
    cloud.servicer.react = good
    release.set()
    until(lambda: late == [1])
    assert link.infer(PAYLOAD, 5.0).reply.probabilities == ((0.25, 0.75),)


def test_a_broken_stream_is_an_error_and_the_next_request_opens_another(cloud: Cloud, link: Link) -> None:
    link.infer(PAYLOAD, 5.0)

    def broken(request: pb.InferRequest) -> list[pb.InferResponse]:
        raise RuntimeError("the servicer died")

    cloud.servicer.react = broken
    with pytest.raises(IsthmusError):
        link.infer(PAYLOAD, 5.0)
    cloud.servicer.react = good
    assert link.infer(PAYLOAD, 5.0).reply.probabilities == ((0.25, 0.75),)
    assert cloud.servicer.streams == 2


def test_a_draining_service_is_sent_nothing_more_but_still_answers(cloud: Cloud, link: Link) -> None:
    farewell = wire.pack_error(0, Draining("bye"))
    cloud.servicer.react = lambda request: [farewell, *good(request)]
    assert link.infer(PAYLOAD, 5.0).reply.probabilities == ((0.25, 0.75),)
    cloud.servicer.react = good
    link.infer(PAYLOAD, 5.0)
    assert cloud.servicer.streams == 2


def test_a_stream_that_ends_while_a_request_is_sent_loses_no_request(
    cloud: Cloud, link: Link, monkeypatch: pytest.MonkeyPatch
) -> None:
    link.infer(PAYLOAD, 5.0)
    send, farewells = InferStream.send, iter([True])

    def interrupted(stream: InferStream, message: pb.InferRequest) -> Any:
        if next(farewells, False):
            stream.retire(Draining("farewell"))
        return send(stream, message)

    monkeypatch.setattr(InferStream, "send", interrupted)
    assert link.infer(PAYLOAD, 5.0).reply.probabilities == ((0.25, 0.75),)
    assert len(cloud.servicer.requests) == 2


def test_after_failures_in_a_row_nothing_is_sent(cloud: Cloud, link: Link) -> None:
    link.infer(PAYLOAD, 5.0)
    cloud.servicer.fingerprint = bytes(32)  # so that the probes keep failing
    cloud.servicer.react = lambda request: [wire.pack_error(request.request_id, ServiceError("broken"))]
    for _ in range(3):
        with pytest.raises(ServiceError):
            link.infer(PAYLOAD, 5.0)
    assert link.state == "open"
    sent = len(cloud.servicer.requests)
    with pytest.raises(LinkDown):
        link.infer(PAYLOAD, 5.0)
    assert len(cloud.servicer.requests) == sent
    assert link.unavailable_reason() is not None


def test_a_probe_finds_the_cloud_again(cloud: Cloud, link: Link) -> None:
    link.infer(PAYLOAD, 5.0)
    cloud.servicer.react = lambda request: [wire.pack_error(request.request_id, ServiceError("broken"))]
    for _ in range(3):
        with pytest.raises(ServiceError):
            link.infer(PAYLOAD, 5.0)
    cloud.servicer.react = good
    until(lambda: link.state == "half_open")
    assert link.infer(PAYLOAD, 5.0).reply.probabilities == ((0.25, 0.75),)
    assert link.state == "closed"
    assert link.unavailable_reason() is None


def test_a_cloud_without_the_bundle_is_named_in_the_refusal(cloud: Cloud) -> None:
    link = Link(f"127.0.0.1:{cloud.port}", bytes(range(1, 33)), (2, 3), breaker=FAST)
    try:
        assert not link.wait_probed(10)
        refusal = link.unavailable_reason() or ""
        assert bytes(range(1, 33)).hex()[:12] in refusal
        assert "fake" in refusal and FINGERPRINT.hex()[:12] in refusal
    finally:
        link.close()


@pytest.mark.parametrize("probabilities", [(0.5,), (0.9, 0.9), (float("nan"), 0.5), (-0.5, 1.5)])
def test_impossible_probabilities_are_refused(cloud: Cloud, link: Link, probabilities: tuple[float, ...]) -> None:
    answer = CloudReply((probabilities,), 0, 0)
    cloud.servicer.react = lambda request: [wire.pack_answer(request.request_id, answer)]
    with pytest.raises(IsthmusError):
        link.infer(PAYLOAD, 5.0)


def test_with_no_time_left_nothing_is_sent(cloud: Cloud, link: Link) -> None:
    with pytest.raises(DeadlineExceeded):
        link.infer(PAYLOAD, 0.0)
    assert cloud.servicer.requests == []


def test_a_cloud_that_goes_away_fails_everything_outstanding_at_once(cloud: Cloud, link: Link) -> None:
    link.infer(PAYLOAD, 5.0)
    cloud.servicer.react = lambda request: []
    with ThreadPoolExecutor(3) as threads:
        calls = [threads.submit(link.infer, PAYLOAD, 60.0) for _ in range(3)]
        until(lambda: len(cloud.servicer.requests) == 4)
        cloud.server.stop(None).wait()
        assert [type(call.exception(30)) for call in calls] == [LinkDown] * 3


def test_an_interrupted_request_does_not_keep_the_trial(
    cloud: Cloud, link: Link, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After Ctrl-C in an interactive interpreter a half-open breaker must admit another trial request."""

    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    assert link.state == "half_open"
    with monkeypatch.context() as patch:
        patch.setattr(link._exchanges, "_exchange", interrupted)
        with pytest.raises(KeyboardInterrupt):
            link.infer(PAYLOAD, 5.0)
    until(lambda: link.state == "half_open")
    assert link.infer(PAYLOAD, 5.0).reply.probabilities == ((0.25, 0.75),)


def test_a_request_is_sent_once_more_after_a_goodbye_and_its_bytes_count_twice(cloud: Cloud, link: Link) -> None:
    link.infer(PAYLOAD, 5.0)
    cloud.servicer.goodbyes = 1
    sent: list[int] = []
    exchange = link.infer(PAYLOAD, 5.0, (0,), sent.append)
    assert exchange.reply.probabilities == ((0.25, 0.75),)
    assert len(sent) == 2 and sum(sent) >= 2 * exchange.up_bytes - 1
    assert (cloud.servicer.streams, link.state) == (2, "closed")


def test_a_second_goodbye_is_a_failure(cloud: Cloud, link: Link) -> None:
    link.infer(PAYLOAD, 5.0)
    cloud.servicer.goodbyes = 2
    with pytest.raises(LinkDown, match="GOAWAY"):
        link.infer(PAYLOAD, 5.0)
    assert len(cloud.servicer.requests) == 3
    assert link.infer(PAYLOAD, 5.0).reply.probabilities == ((0.25, 0.75),)


def test_a_request_that_draining_refuses_is_sent_once_more(cloud: Cloud, link: Link) -> None:
    link.infer(PAYLOAD, 5.0)
    refusals = iter([True])

    def draining(request: pb.InferRequest) -> list[pb.InferResponse]:
        if not next(refusals, False):
            return good(request)
        return [wire.pack_error(0, Draining("bye")), wire.pack_error(request.request_id, Draining("bye"))]

    cloud.servicer.react = draining
    assert link.infer(PAYLOAD, 5.0).reply.probabilities == ((0.25, 0.75),)
    assert cloud.servicer.streams == 2


def test_an_idle_stream_is_half_closed_and_the_next_request_opens_another(
    cloud: Cloud, link: Link, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "IDLE_STREAM_S", 0.05)
    link.infer(PAYLOAD, 5.0)
    stream = link._exchanges._stream
    assert stream is not None
    link._health.wake.set()
    time.sleep(0.1)
    link._health.wake.set()
    until(lambda: link._exchanges._stream is None)
    until(lambda: cloud.servicer.ended == 1)
    assert link.infer(PAYLOAD, 5.0).reply.probabilities == ((0.25, 0.75),)
    assert (cloud.servicer.streams, link.state) == (2, "closed")


def test_a_stream_is_replaced_after_a_while_and_what_is_under_way_is_answered(
    cloud: Cloud, link: Link, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A balancer places whole streams: one in use for ever would never reach a replica that came later."""
    release = threading.Event()

    def slow(request: pb.InferRequest) -> list[pb.InferResponse]:
        release.wait(10)
        return good(request)

    link.infer(PAYLOAD, 5.0)
    cloud.servicer.react = slow
    with ThreadPoolExecutor(1) as threads:
        first = threads.submit(link.infer, PAYLOAD, 5.0)
        until(lambda: len(cloud.servicer.requests) == 2)
        monkeypatch.setattr(limits, "MAX_STREAM_S", 0.0)
        cloud.servicer.react = good
        link.infer(PAYLOAD, 5.0)
        release.set()
        assert first.result().reply.probabilities == ((0.25, 0.75),)
    until(lambda: cloud.servicer.ended == 1)
    assert (cloud.servicer.streams, link.state) == (2, "closed")


def hanging(request: pb.InferRequest) -> list[pb.InferResponse]:
    return []


@pytest.mark.parametrize("budget_s", [0.0, 0.001, 0.02])
def test_deadlines_too_short_for_any_cloud_open_no_breaker(cloud: Cloud, link: Link, budget_s: float) -> None:
    link.infer(PAYLOAD, 5.0)
    cloud.servicer.react = hanging
    for _ in range(6):
        with pytest.raises(DeadlineExceeded):
            link.infer(PAYLOAD, budget_s)
    cloud.servicer.react = good
    assert link.state == "closed"
    assert link.infer(PAYLOAD, 5.0).reply.probabilities == ((0.25, 0.75),)


def test_deadlines_too_short_to_tell_let_a_check_find_a_lost_cloud(
    cloud: Cloud, link: Link, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "PROBE_TIMEOUT_S", 0.3)
    link.infer(PAYLOAD, 5.0)
    cloud.servicer.react = hanging
    cloud.servicer.described.clear()
    with pytest.raises(DeadlineExceeded):
        link.infer(PAYLOAD, 0.02)
    until(lambda: link.state == "open")
    cloud.servicer.described.set()
    until(lambda: link.state == "half_open")


def test_a_request_that_was_not_sent_keeps_no_trial_and_proves_nothing(
    cloud: Cloud, link: Link, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(request: object) -> None:
        raise PayloadTooLarge("over the cap")

    assert link.state == "half_open"
    with monkeypatch.context() as patch:
        patch.setattr(exchanges.wire, "pack_request", refuse)
        with pytest.raises(PayloadTooLarge):
            link.infer(PAYLOAD, 5.0)
    assert link.state == "half_open"
    assert link.infer(PAYLOAD, 5.0).reply.probabilities == ((0.25, 0.75),)


def test_a_request_after_close_is_a_clear_error(cloud: Cloud) -> None:
    link = Link(f"127.0.0.1:{cloud.port}", FINGERPRINT, (2, 3), breaker=FAST)
    assert link.wait_probed(10)
    link.infer(PAYLOAD, 5.0)
    link.close()
    with pytest.raises(AgentClosed, match="was closed"):
        link.infer(PAYLOAD, 5.0)
    assert link.state == "closed"


def test_malformed_replies_open_the_breaker(cloud: Cloud, link: Link) -> None:
    link.infer(PAYLOAD, 5.0)
    cloud.servicer.react = lambda request: [wire.pack_answer(request.request_id, CloudReply(((0.9, 0.9),), 0, 0))]
    cloud.servicer.fingerprint = bytes(32)
    for _ in range(3):
        assert link.state == "closed"
        with pytest.raises(InvalidReply):
            link.infer(PAYLOAD, 5.0)
    assert link.state == "open"


@pytest.mark.parametrize("error", [UnknownBundle, UnsupportedVersion])
def test_a_refusal_that_would_repeat_closes_the_way_until_describe_says_otherwise(
    cloud: Cloud, link: Link, error: type[IsthmusError]
) -> None:
    link.infer(PAYLOAD, 5.0)
    cloud.servicer.fingerprint = bytes(32)
    cloud.servicer.react = lambda request: [wire.pack_error(request.request_id, error("another one"))]
    sent: list[int] = []
    with pytest.raises(error):
        link.infer(PAYLOAD, 5.0, (0,), sent.append)
    assert len(sent) == 1
    until(lambda: "bundle" in (link.unavailable_reason() or ""))  # a probe has asked
    assert link.state == "open"
    with pytest.raises(LinkDown):
        link.infer(PAYLOAD, 5.0, (0,), sent.append)
    assert len(sent) == 1 and len(cloud.servicer.requests) == 2
    cloud.servicer.fingerprint, cloud.servicer.react = FINGERPRINT, good
    until(lambda: link.state == "half_open")
    assert link.infer(PAYLOAD, 5.0).reply.probabilities == ((0.25, 0.75),)


@pytest.mark.parametrize("error", [Overloaded, DeadlineExceeded])
def test_a_cloud_that_says_it_has_too_much_to_do_is_not_lost(
    cloud: Cloud, link: Link, error: type[IsthmusError]
) -> None:
    link.infer(PAYLOAD, 5.0)
    cloud.servicer.react = lambda request: [wire.pack_error(request.request_id, error("full"))]
    for _ in range(6):
        with pytest.raises(error):
            link.infer(PAYLOAD, 5.0)
    assert (link.state, link._health._window.size) == ("closed", 1)


def test_nothing_is_sent_before_the_cloud_may_have_room(cloud: Cloud, link: Link) -> None:
    link.infer(PAYLOAD, 5.0)
    sent: list[int] = []
    cloud.servicer.react = lambda request: [wire.pack_error(request.request_id, Overloaded("full", 600.0))]
    for _ in range(3):
        with pytest.raises(Overloaded) as refused:
            link.infer(PAYLOAD, 0.9, sent=sent.append)
    assert len(sent) == 1 and "no room yet" in str(refused.value)
    assert 0 < refused.value.retry_s <= 1.5 * health.MAX_HOLD_S, "a wild hint keeps nobody away for long"
    cloud.servicer.react = good
    link._health._hold_until_s = time.monotonic()
    assert link.infer(PAYLOAD, 5.0).reply.probabilities == ((0.25, 0.75),)


def test_a_request_with_time_to_spare_waits_until_the_cloud_may_have_room(cloud: Cloud, link: Link) -> None:
    link.infer(PAYLOAD, 5.0)
    cloud.servicer.react = lambda request: [wire.pack_error(request.request_id, Overloaded("full", 0.2))]
    with pytest.raises(Overloaded):
        link.infer(PAYLOAD, 0.1)
    cloud.servicer.react, held_until_s = good, link._health._hold_until_s
    assert held_until_s > time.monotonic()
    assert link.infer(PAYLOAD, 5.0).reply.probabilities == ((0.25, 0.75),)
    assert time.monotonic() >= held_until_s


def test_requests_that_are_late_beside_others_in_time_open_no_breaker(cloud: Cloud, link: Link) -> None:
    link.infer(PAYLOAD, 5.0)
    sent: list[int] = []

    def last_in_time(request: pb.InferRequest) -> list[pb.InferResponse]:
        sent.append(request.request_id)
        return good(request) if len(sent) == 6 else []

    cloud.servicer.react = last_in_time
    with ThreadPoolExecutor(6) as threads:
        calls = [threads.submit(link.infer, PAYLOAD, 0.5) for _ in range(5)]
        until(lambda: len(sent) == 5)
        link.infer(PAYLOAD, 5.0)
        assert [type(call.exception(30)) for call in calls] == [DeadlineExceeded] * 5
    assert (link.state, link._health._window.size) == ("closed", 4), "one decrease for all that were sent before it"


def test_requests_that_fail_together_count_once(cloud: Cloud, link: Link) -> None:
    link.infer(PAYLOAD, 5.0)
    cloud.servicer.react = hanging
    with ThreadPoolExecutor(6) as threads:
        calls = [threads.submit(link.infer, PAYLOAD, 0.3) for _ in range(6)]
        assert [type(call.exception(30)) for call in calls] == [DeadlineExceeded] * 6
    assert link.state == "closed"
    for _ in range(2):
        assert link.state == "closed"
        with pytest.raises(DeadlineExceeded):
            link.infer(PAYLOAD, 0.3)
    assert link.state == "open", "the third failure in a row"


def test_work_under_way_is_not_cancelled_when_the_breaker_opens(cloud: Cloud, link: Link) -> None:
    link.infer(PAYLOAD, 5.0)
    stream = link._exchanges._stream
    assert stream is not None
    release, first = threading.Event(), threading.Event()

    def slow(request: pb.InferRequest) -> list[pb.InferResponse]:
        first.set()
        release.wait(10)
        return good(request)

    cloud.servicer.react = slow
    cloud.servicer.fingerprint = bytes(32)  # so that the probes keep failing
    with ThreadPoolExecutor(1) as threads:
        call = threads.submit(link.infer, PAYLOAD, 30.0)
        assert first.wait(10)
        for _ in range(3):
            link.record_failure("another request failed")
        assert link.state == "open"
        release.set()
        assert call.result(30).reply.probabilities == ((0.25, 0.75),)
    until(lambda: not stream._call.is_active())  # and then the stream is given up


def test_no_more_requests_are_in_flight_than_the_window_has_room_for(cloud: Cloud, link: Link) -> None:
    link.infer(PAYLOAD, 5.0)
    arrived: list[int] = []

    def slow(request: pb.InferRequest) -> list[pb.InferResponse]:
        arrived.append(request.request_id)
        return []

    cloud.servicer.react = slow
    with ThreadPoolExecutor(8) as threads:
        calls = [threads.submit(link.infer, PAYLOAD, 60.0) for _ in range(8)]
        until(lambda: len(arrived) == 8)
        for _ in range(3):
            with pytest.raises(Overloaded, match="in flight"):
                link.infer(PAYLOAD, 0.1)
        assert (len(arrived), link.state) == (8, "closed")
        link.close()
        assert [type(call.exception(30)) for call in calls] == [LinkDown] * 8
