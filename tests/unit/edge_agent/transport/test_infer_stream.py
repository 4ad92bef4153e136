"""The stream over a call in this process, which answers as each test says."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from typing import Any

import grpc
import pytest

from isthmus.edge_agent.transport import infer_stream as module
from isthmus.edge_agent.transport.infer_stream import InferStream
from isthmus.models.errors import Draining, InvalidReply, LinkDown, ServiceError
from isthmus.models.messages import CloudReply
from isthmus.protos import wire
from isthmus.protos.isthmus.v1 import isthmus_pb2 as pb

WAIT_S = 10.0  # for what comes at once


class Lost(grpc.RpcError):  # type: ignore[misc]
    def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.INTERNAL

    def details(self) -> str:
        return "lost"


class Call:
    """A call whose responses the test puts: None ends it, an error breaks it. It collects the requests."""

    def __init__(self, requests: Iterator[pb.InferRequest]) -> None:
        self.responses: SimpleQueue[pb.InferResponse | Exception | None] = SimpleQueue()
        self.requests: list[int] = []
        self.half_closed = threading.Event()
        threading.Thread(target=self._collect, args=(requests,), daemon=True).start()

    def __iter__(self) -> Iterator[pb.InferResponse]:
        while (response := self.responses.get()) is not None:
            if isinstance(response, Exception):
                raise response
            yield response

    def cancel(self) -> None:
        self.responses.put(None)

    def respond(self, *ids: int) -> None:
        for id_ in ids:
            answer = wire.pack_answer(id_, CloudReply(((0.5, 0.5),), 0, 0))
            self.responses.put(answer if id_ else wire.pack_error(0, Draining("bye")))

    def _collect(self, requests: Iterator[pb.InferRequest]) -> None:
        self.requests.extend(request.request_id for request in requests)
        self.half_closed.set()


class Stub:
    def InferStream(self, requests: Iterator[pb.InferRequest]) -> Call:
        self.call = Call(requests)
        return self.call


@pytest.fixture
def late() -> list[int]:
    return []


@pytest.fixture
def open_stream(late: list[int]) -> Callable[[], tuple[InferStream, Call]]:
    def opened() -> tuple[InferStream, Call]:
        stub = Stub()
        stream = InferStream(stub, lambda: late.append(1))  # type: ignore[arg-type]
        return stream, stub.call

    return opened


def send(stream: InferStream, id_: int) -> Any:
    future = stream.send(pb.InferRequest(request_id=id_))
    assert future is not None
    return future


def test_each_response_resolves_the_future_of_its_request(open_stream: Any, late: list[int]) -> None:
    stream, call = open_stream()
    futures = {id_: send(stream, id_) for id_ in (1, 2, 3)}
    call.respond(3, 1, 2)
    assert [futures[id_].result(WAIT_S).request_id for id_ in futures] == [1, 2, 3]
    assert late == []


def test_a_response_that_nobody_waits_for_is_late(open_stream: Any, late: list[int]) -> None:
    stream, call = open_stream()
    send(stream, 1)
    second = send(stream, 2)
    stream.give_up(1)
    call.respond(1, 2)
    assert second.result(WAIT_S).request_id == 2
    assert late == [1]


def test_after_a_farewell_nothing_is_sent_and_what_is_outstanding_is_delivered(open_stream: Any) -> None:
    stream, call = open_stream()
    outstanding = send(stream, 1)
    call.respond(0)
    assert call.half_closed.wait(WAIT_S)
    assert stream.send(pb.InferRequest(request_id=2)) is None
    assert isinstance(stream.ended, Draining)
    call.respond(1)
    assert outstanding.result(WAIT_S).request_id == 1
    assert call.requests == [1]


@pytest.mark.parametrize(("end", "error"), [(None, LinkDown), (Lost(), ServiceError)])
def test_the_end_of_the_call_fails_what_is_outstanding(open_stream: Any, end: Any, error: type[Exception]) -> None:
    stream, call = open_stream()
    futures = [send(stream, id_) for id_ in (1, 2)]
    call.responses.put(end)
    assert [type(future.exception(WAIT_S)) for future in futures] == [error] * 2
    assert type(stream.ended) is error
    assert stream.send(pb.InferRequest(request_id=3)) is None


def test_the_first_reason_to_end_is_kept(open_stream: Any) -> None:
    stream, _ = open_stream()
    stream.retire(Draining("farewell"))
    stream.cancel()
    assert isinstance(stream.ended, Draining)


def test_cancelling_fails_what_is_outstanding(open_stream: Any) -> None:
    stream, _ = open_stream()
    future = send(stream, 1)
    stream.cancel()
    assert isinstance(future.exception(WAIT_S), LinkDown)


def test_a_request_that_is_being_sent_leaves_before_the_stream_half_closes(
    open_stream: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[InferStream] = []

    class Slow(SimpleQueue[Any]):
        """Lets a farewell try to overtake each request."""

        def put(self, item: Any, block: bool = True, timeout: float | None = None) -> None:
            if item is not None:
                farewell = threading.Thread(target=opened[0].retire, args=(Draining("farewell"),))
                farewell.start()
                farewell.join(0.1)
            super().put(item)

    monkeypatch.setattr(module, "SimpleQueue", Slow)
    stream, call = open_stream()
    opened.append(stream)
    send(stream, 1)
    assert call.half_closed.wait(WAIT_S)
    assert call.requests == [1]


def test_a_stream_is_idle_while_nothing_is_outstanding(open_stream: Any) -> None:
    stream, call = open_stream()
    assert stream.idle_s > 0
    future = send(stream, 1)
    assert stream.idle_s == 0
    call.respond(1)
    future.result(WAIT_S)
    assert stream.idle_s > 0
    send(stream, 2)
    stream.give_up(2)
    assert stream.idle_s > 0


def test_a_response_with_a_flipped_bit_is_given_to_nobody(open_stream: Any) -> None:
    """The flip turns the answer to request 2 into one to request 3."""
    stream, call = open_stream()
    futures = [send(stream, id_) for id_ in (2, 3)]
    flipped = wire.pack_answer(2, CloudReply(((0.5, 0.5),), 0.0, 0.0))
    flipped.request_id = 3
    call.responses.put(flipped)
    assert [type(future.exception(WAIT_S)) for future in futures] == [InvalidReply] * 2
    assert isinstance(stream.ended, InvalidReply)


@pytest.mark.parametrize("ids", [(9,), (1, 1)], ids=["unknown", "twice"])
def test_an_id_that_is_not_outstanding_ends_the_stream(open_stream: Any, late: list[int], ids: tuple[int, ...]) -> None:
    stream, call = open_stream()
    futures = [send(stream, id_) for id_ in (1, 2)]
    call.respond(*ids)
    assert isinstance(futures[1].exception(WAIT_S), InvalidReply)
    assert late == []


def test_a_late_response_is_late_once(open_stream: Any, late: list[int]) -> None:
    stream, call = open_stream()
    other = send(stream, 1)
    send(stream, 2)
    stream.give_up(2)
    call.respond(2, 2)
    assert isinstance(other.exception(WAIT_S), InvalidReply)
    assert late == [1]


def test_an_end_while_nothing_is_outstanding_fails_nobody(
    open_stream: Callable[[], tuple[InferStream, Call]], late: list[int]
) -> None:
    """So the service ends an idle stream; the link opens another for the next request."""
    stream, call = open_stream()
    future = stream.send(pb.InferRequest(request_id=1))
    call.respond(1)
    assert future is not None and future.result(WAIT_S).request_id == 1
    call.responses.put(None)
    assert call.half_closed.wait(WAIT_S)
    assert stream.send(pb.InferRequest(request_id=2)) is None
    assert (isinstance(stream.ended, LinkDown), late) == (True, [])
