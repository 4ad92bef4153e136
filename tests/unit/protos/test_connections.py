"""The bound on connections and the time limits of clients, over transports that only remember what was done to them."""

from __future__ import annotations

import asyncio
import logging
import resource
from collections.abc import Callable
from typing import Any

import pytest
import uvicorn
from uvicorn.server import ServerState

from isthmus.protos.connections import DESCRIPTORS_EACH, Connection, Connections

HEAD = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
UPLOAD = b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n"


class StubTransport(asyncio.Transport):
    def __init__(self) -> None:
        super().__init__({"sockname": ("127.0.0.1", 80), "peername": ("127.0.0.1", 1000)})
        self.protocol: asyncio.Protocol
        self.aborted = asyncio.Event()
        self.written = b""

    def abort(self) -> None:
        self.aborted.set()
        asyncio.get_running_loop().call_soon(self.protocol.connection_lost, None)

    def write(self, data: Any) -> None:
        self.written += data

    def is_closing(self) -> bool:
        return self.aborted.is_set()

    def close(self) -> None: ...

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...


async def endless(scope: Any, receive: Any, send: Any) -> None:
    """Reads the body, and never answers."""
    while (await receive())["type"] != "http.disconnect":
        pass


class Opened:
    """Opens connections of one server."""

    def __init__(self, most: int, timeout_s: float = 60.0) -> None:
        self.connections = Connections(most, timeout_s)
        self.config = uvicorn.Config(endless, interface="asgi3", lifespan="off", log_level="critical")
        self.state = ServerState()

    def open(self, data: bytes = b"") -> Connection:
        connection = self.connections.protocol(config=self.config, server_state=self.state, app_state={})
        transport = StubTransport()
        transport.protocol = connection
        connection.connection_made(transport)
        if data:
            connection.data_received(data)
        return connection


def aborted(connection: Connection) -> bool:
    return connection.transport.is_closing()


def run(test: Callable[[], Any]) -> None:
    asyncio.run(test())


def test_one_too_many_closes_the_oldest_that_has_sent_no_request_then_the_oldest_upload() -> None:
    async def test() -> None:
        opened = Opened(4)
        answered, upload, silent, partial = map(opened.open, (HEAD, UPLOAD, b"", HEAD[:9]))
        later = []
        for victim in (silent, partial, upload):
            assert not aborted(victim)
            later.append(opened.open(HEAD))
            assert aborted(victim) and len(opened.connections) == 4
        assert not any(map(aborted, [answered, *later]))
        assert aborted(opened.open(HEAD)), "there is nothing else to close"

    run(test)


@pytest.mark.parametrize("data", [b"", HEAD[:-2]])
def test_a_head_that_does_not_arrive_in_time_closes_the_connection(data: bytes) -> None:
    async def test() -> None:
        connection = Opened(4, timeout_s=0.01).open(data)
        await asyncio.wait_for(connection.transport.aborted.wait(), 10)  # type: ignore[attr-defined]

    run(test)


def test_bytes_of_a_head_one_by_one_give_no_more_time() -> None:
    async def test() -> None:
        connection = Opened(4, timeout_s=0.05).open()
        for byte in (HEAD[:-4] + b"\r\nX: " + b"y" * 10_000)[:10_000]:
            if aborted(connection):
                return
            connection.data_received(bytes([byte]))
            await asyncio.sleep(0.001)
        raise AssertionError("it was given 10 s")

    run(test)


def test_a_request_under_way_has_its_time() -> None:
    async def test() -> None:
        connection = Opened(4, timeout_s=0.01).open(HEAD)
        await asyncio.sleep(0.05)
        assert not aborted(connection)
        connection.pause_writing()  # the client reads nothing any more
        await asyncio.wait_for(connection.transport.aborted.wait(), 10)  # type: ignore[attr-defined]

    run(test)


def test_what_a_client_sends_gives_it_no_time_to_read() -> None:
    async def test() -> None:
        connection = Opened(4, timeout_s=0.05).open(HEAD)
        connection.pause_writing()
        connection.data_received(b"G")
        try:
            await asyncio.wait_for(connection.transport.aborted.wait(), 5)  # type: ignore[attr-defined]
        finally:
            connection.resume_writing()

    run(test)


def test_a_client_that_reads_again_in_time_is_answered() -> None:
    async def test() -> None:
        connection = Opened(4, timeout_s=0.05).open(HEAD)
        connection.pause_writing()
        connection.resume_writing()
        await asyncio.sleep(0.1)
        assert not aborted(connection)

    run(test)


def test_connections_leave_file_descriptors_for_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda which: (100, 1000))
    assert [Connections(most, 1.0).most for most in (10, 5000)] == [10, 100 // DESCRIPTORS_EACH]


def test_running_out_of_file_descriptors_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    connections, loop = Connections(4, 1.0), asyncio.new_event_loop()
    failure = {"message": "socket.accept() out of system resource", "exception": OSError(24, "Too many open files")}
    with caplog.at_level(logging.ERROR):
        for _ in range(2048):
            connections.on_loop_error(loop, failure)
        assert [record.getMessage() for record in caplog.records] == [
            "no connection can be accepted at the moment: [Errno 24] Too many open files"
        ]
        connections.on_loop_error(loop, {"message": "another thing"})
    loop.close()
    assert len(caplog.records) == 2
