from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, Counter

from isthmus.cloud_service.metrics_server import MAX_CONNECTIONS, MetricsServer
from isthmus.models.errors import InvalidInput


@pytest.fixture
def registry() -> CollectorRegistry:
    registry = CollectorRegistry()
    Counter("isthmus_test_seen", "Seen.", registry=registry).inc(3)
    return registry


@pytest.fixture
def taken() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as other:
        yield f"127.0.0.1:{other.getsockname()[1]}"


def scenario(registry: CollectorRegistry, play: Callable[[int], Coroutine[Any, Any, None]]) -> None:
    async def both() -> None:
        server = MetricsServer("127.0.0.1:0", registry)
        task = asyncio.create_task(server.run_until_exit())
        await asyncio.wait_for(play(server.port), 30)
        server.should_exit = True
        await asyncio.wait_for(task, 30)

    asyncio.run(both())


async def ask(port: int, line: str, *headers: str) -> str:
    """Head and body of the response to one request."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write("\r\n".join([f"{line} HTTP/1.1", "Host: localhost", "Connection: close", *headers, "", ""]).encode())
    text = (await reader.read()).decode()
    writer.close()
    return text


def test_metrics_are_served_in_the_format_that_is_asked_for(registry: CollectorRegistry) -> None:
    async def play(port: int) -> None:
        plain = await ask(port, "GET /metrics")
        assert plain.startswith("HTTP/1.1 200") and "isthmus_test_seen_total 3.0" in plain
        assert "content-type: text/plain" in plain
        assert "# EOF" in await ask(port, "GET /metrics", "Accept: application/openmetrics-text; version=1.0.0")

    scenario(registry, play)


def test_other_methods_and_paths(registry: CollectorRegistry) -> None:
    async def play(port: int) -> None:
        head = await ask(port, "HEAD /metrics")
        assert head.startswith("HTTP/1.1 200") and head.endswith("\r\n\r\n")
        assert (await ask(port, "GET /")).startswith("HTTP/1.1 404")
        post = await ask(port, "POST /metrics")
        assert post.startswith("HTTP/1.1 405") and "allow: " in post

    scenario(registry, play)


def test_silent_connections_take_no_thread_and_keep_nobody_out(registry: CollectorRegistry) -> None:
    async def play(port: int) -> None:
        threads = threading.active_count()
        silent = [await asyncio.open_connection("127.0.0.1", port) for _ in range(5 * MAX_CONNECTIONS)]
        assert (await ask(port, "GET /metrics")).startswith("HTTP/1.1 200")
        closed = 0
        for reader, _ in silent:
            with contextlib.suppress(TimeoutError, ConnectionError):
                closed += await asyncio.wait_for(reader.read(1), 0.001) == b""
        assert threading.active_count() == threads
        open_ = sum(not reader.at_eof() and reader.exception() is None for reader, _ in silent)
        assert open_ <= MAX_CONNECTIONS
        for _, writer in silent:
            writer.close()

    scenario(registry, play)


@pytest.mark.parametrize("address", ["9101", "127.0.0.1:", "127.0.0.1:http", "127.0.0.1:70000"])
def test_a_wrong_address_is_named(registry: CollectorRegistry, address: str) -> None:
    with pytest.raises(InvalidInput, match=f"cannot serve metrics on {address}"):
        MetricsServer(address, registry)


def test_a_taken_port_is_named(registry: CollectorRegistry, taken: str) -> None:
    with pytest.raises(InvalidInput, match=taken):
        MetricsServer(taken, registry)
