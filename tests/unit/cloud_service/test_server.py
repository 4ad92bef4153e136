from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client import CollectorRegistry

from isthmus.cloud_service.byte_budget import ByteBudget
from isthmus.cloud_service.config import CloudConfig, Tls
from isthmus.cloud_service.language.service import LanguageService
from isthmus.cloud_service.metrics import CloudMetrics
from isthmus.cloud_service.server import Server, bind
from isthmus.cloud_service.servicer import MAX_CALLS, Servicer
from isthmus.cloud_service.tls import RotatingCertificate
from isthmus.cloud_service.vision.batching import BatchLimits
from isthmus.cloud_service.vision.worker import Worker
from isthmus.models.errors import InvalidInput
from isthmus.protos import limits
from isthmus.protos.isthmus.v1 import isthmus_pb2 as pb
from isthmus.protos.isthmus.v1 import isthmus_pb2_grpc as pb_grpc


@pytest.fixture
def taken() -> Iterator[str]:
    """An address that somebody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        yield f"127.0.0.1:{other.getsockname()[1]}"


def try_bind(address: str, tls: Tls | None = None) -> int:
    async def play() -> int:
        certificate = RotatingCertificate(tls) if tls else None
        return bind(grpc.aio.server(options=limits.server_options()), address, certificate)

    return asyncio.run(play())


def test_port_zero_is_a_port_that_was_free() -> None:
    assert try_bind("127.0.0.1:0") > 0


def test_a_taken_port_is_an_error_that_names_it(taken: str) -> None:
    with pytest.raises(InvalidInput, match=taken):
        try_bind(taken)


def test_certificates_that_cannot_be_read_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"none\.key: cannot be read: no such file"):
        try_bind("127.0.0.1:0", Tls(tmp_path / "none.pem", tmp_path / "none.key"))


def test_files_of_tls_that_do_not_fit_are_named(tmp_path: Path) -> None:
    for name in ("one", "other"):
        certificate = trustme.CA().issue_cert("localhost")
        certificate.cert_chain_pems[0].write_to_path(tmp_path / f"{name}.pem")
        certificate.private_key_pem.write_to_path(tmp_path / f"{name}.key")
    with pytest.raises(InvalidInput, match=r"^[^ ]*other\.key: is the key of another certificate than [^ ]*one\.pem$"):
        try_bind("127.0.0.1:0", Tls(tmp_path / "one.pem", tmp_path / "other.key"))
    with pytest.raises(InvalidInput, match=r"^[^ ]*other\.key: holds no certificate in PEM$"):
        try_bind("127.0.0.1:0", Tls(tmp_path / "one.pem", tmp_path / "one.key", tmp_path / "other.key"))


def test_files_that_are_no_certificates_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "junk.pem").write_bytes(b"no certificate")
    with pytest.raises(InvalidInput, match=r"^[^ ]*junk\.pem: holds no certificate in PEM$"):
        try_bind("127.0.0.1:0", Tls(tmp_path / "junk.pem", tmp_path / "junk.pem"))


class IdleRunner:
    """Runs until drained; `failure` ends it early."""

    def __init__(self) -> None:
        self.failure: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._drained = asyncio.Event()

    async def run(self) -> None:
        drained = asyncio.create_task(self._drained.wait())
        await asyncio.wait([drained, self.failure], return_when=asyncio.FIRST_COMPLETED)
        if self.failure.done():
            self.failure.result()

    def drain(self) -> None:
        self._drained.set()


class ServerHarness:
    """A server with idle runners on a free port."""

    def __init__(self) -> None:
        registry = CollectorRegistry()
        metrics = CloudMetrics(registry, [])
        self.vision, self.language = IdleRunner(), IdleRunner()
        self.servicer = Servicer(
            Worker([], [], BatchLimits(), 1, metrics), LanguageService(), metrics, ByteBudget(1 << 20)
        )
        self.server = Server(self.servicer, self.vision, self.language)
        self._registry = registry

    async def start(self) -> str:
        """Its address."""
        ports = await self.server.start(CloudConfig(listen="127.0.0.1:0", metrics=None), self._registry)
        assert ports.grpc > 0 and ports.metrics is None
        return f"127.0.0.1:{ports.grpc}"


@pytest.mark.parametrize("wing", ["vision", "language"])
def test_a_runner_that_fails_stops_the_server(wing: str) -> None:
    """Or a service without its compute thread would look healthy."""

    async def play() -> None:
        harness = ServerHarness()
        await harness.start()
        await asyncio.sleep(0.02)
        assert not harness.server.stopping.is_set()
        getattr(harness, wing).failure.set_exception(RuntimeError("a bug"))
        await asyncio.wait_for(harness.server.stopping.wait(), 10)
        with pytest.raises(RuntimeError, match="a bug"):
            await harness.server.drain(1.0)

    asyncio.run(play())


async def open_streams(channels: list[grpc.aio.Channel], each: int, servicer: Servicer) -> list[Any]:
    """Streams that send nothing, `each` of them over every channel."""
    stubs = [pb_grpc.IsthmusStub(channel) for channel in channels for _ in range(each)]
    calls = [stub.InferStream() for stub in stubs]
    while len(servicer._calls) < len(calls):
        await asyncio.sleep(0.01)
        # gRPC cancels about one stream in 30,000 at its start, below every limit, and before the servicer has it
        calls = [stub.InferStream() if call.done() else call for stub, call in zip(stubs, calls, strict=True)]
    return calls


async def status_of(call: Any) -> grpc.StatusCode:
    """How a stream ended; gRPC says so after its last message."""
    with contextlib.suppress(grpc.aio.AioRpcError):
        async for _ in call:
            pass
    return await asyncio.wait_for(call.code(), 10)  # type: ignore[no-any-return]


async def check(address: str, *, own_connection: str) -> int:
    options = [("grpc.channel_id", own_connection)]  # or gRPC shares connections
    async with grpc.aio.insecure_channel(address, options) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        return int((await stub.Check(health_pb2.HealthCheckRequest(), timeout=10)).status)


def test_idle_streams_lock_nobody_out_and_hold_no_drain(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as there may be calls: health answers, another stream finds a place, and all end with the drain."""
    monkeypatch.setattr("isthmus.cloud_service.open_calls.IDLE_STREAM_S", 0.0)
    monkeypatch.setattr(limits, "GOODBYE_S", 0.2)

    async def play() -> None:
        harness = ServerHarness()
        address = await harness.start()
        async with contextlib.AsyncExitStack() as stack:
            connections = [
                grpc.aio.insecure_channel(address, [("grpc.channel_id", str(number))])
                for number in range(MAX_CALLS // limits.MAX_CONNECTION_STREAMS)
            ]
            for channel in connections:
                await stack.enter_async_context(channel)
            calls = await open_streams(connections, limits.MAX_CONNECTION_STREAMS, harness.servicer)
            assert len(calls) == MAX_CALLS
            assert await check(address, own_connection="health") == health_pb2.HealthCheckResponse.SERVING
            other = await stack.enter_async_context(grpc.aio.insecure_channel(address, [("grpc.channel_id", "other")]))
            late = pb_grpc.IsthmusStub(other).InferStream()
            await late.write(pb.InferRequest(request_id=1))
            assert (await late.read()).request_id == 1
            assert sum(call.done() for call in calls) <= 1  # the one that left its place
            await asyncio.wait_for(harness.server.drain(60.0), 30)
            assert {await status_of(call) for call in calls} <= {grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE}

    asyncio.run(play())


def test_one_connection_has_a_limited_number_of_streams() -> None:
    async def play() -> None:
        harness = ServerHarness()
        address = await harness.start()
        async with grpc.aio.insecure_channel(address) as channel:
            stub = pb_grpc.IsthmusStub(channel)
            calls = [stub.InferStream() for _ in range(limits.MAX_CONNECTION_STREAMS + 20)]
            while len(harness.servicer._calls) < limits.MAX_CONNECTION_STREAMS:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.1)
            assert len(harness.servicer._calls) == limits.MAX_CONNECTION_STREAMS
            assert not any(call.done() for call in calls)
        await harness.server.drain(1.0)

    asyncio.run(play())


def test_a_client_that_watches_health_does_not_hold_the_drain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "GOODBYE_S", 0.0)

    async def play() -> None:
        harness = ServerHarness()
        async with grpc.aio.insecure_channel(await harness.start()) as channel:
            watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
            await asyncio.wait_for(harness.server.drain(60.0), 30)

    asyncio.run(play())


def test_the_drain_has_one_deadline_for_streams_and_runners(caplog: pytest.LogCaptureFixture) -> None:
    """Neither a stream with a message on the way nor a runner that goes on holds it any longer."""

    async def play() -> None:
        harness = ServerHarness()
        harness.vision.drain = lambda: None  # type: ignore[method-assign]
        async with grpc.aio.insecure_channel(await harness.start()) as channel:
            (call,) = await open_streams([channel], 1, harness.servicer)
            await asyncio.wait_for(harness.server.drain(0.2), 30)
            assert await status_of(call) is grpc.StatusCode.UNAVAILABLE
        assert len(harness.servicer._calls) == 0
        assert harness.server._running[0].cancelled()

    asyncio.run(play())
    assert "not answered within 0.2 s" in caplog.text
