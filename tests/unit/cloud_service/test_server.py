from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from prometheus_client import CollectorRegistry

from isthmus.cloud_service.config import CloudConfig, Tls
from isthmus.cloud_service.language.service import LanguageService
from isthmus.cloud_service.metrics import CloudMetrics
from isthmus.cloud_service.server import Server, bind
from isthmus.cloud_service.servicer import Servicer
from isthmus.cloud_service.vision.batching import BatchLimits
from isthmus.cloud_service.vision.worker import Worker
from isthmus.models.errors import InvalidInput
from isthmus.protos import limits


@pytest.fixture
def taken() -> Iterator[str]:
    """An address that somebody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        yield f"127.0.0.1:{other.getsockname()[1]}"


def try_bind(address: str, tls: Tls | None = None) -> int:
    async def play() -> int:
        return bind(grpc.aio.server(options=limits.server_options()), address, tls)

    return asyncio.run(play())


def test_port_zero_is_a_port_that_was_free() -> None:
    assert try_bind("127.0.0.1:0") > 0


def test_a_taken_port_is_an_error_that_names_it(taken: str) -> None:
    with pytest.raises(InvalidInput, match=taken):
        try_bind(taken)


def test_certificates_that_cannot_be_read_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="No such file"):
        try_bind("127.0.0.1:0", Tls(tmp_path / "none.pem", tmp_path / "none.key"))


def test_files_that_are_no_certificates_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "junk.pem").write_bytes(b"no certificate")
    with pytest.raises(InvalidInput, match="cannot listen"):
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


@pytest.mark.parametrize("wing", ["vision", "language"])
def test_a_runner_that_fails_stops_the_server(wing: str) -> None:
    """Or a service without its compute thread would look healthy."""

    async def play() -> None:
        registry = CollectorRegistry()
        metrics = CloudMetrics(registry, [])
        servicer = Servicer(Worker([], [], BatchLimits(), 1, metrics), LanguageService(), metrics)
        runners = {"vision": IdleRunner(), "language": IdleRunner()}
        server = Server(servicer, **runners)
        ports = await server.start(CloudConfig(listen="127.0.0.1:0", metrics=None), registry)
        assert ports.grpc > 0 and ports.metrics is None
        await asyncio.sleep(0.02)
        assert not server.stopping.is_set()
        runners[wing].failure.set_exception(RuntimeError("a bug"))
        await asyncio.wait_for(server.stopping.wait(), 10)
        with pytest.raises(RuntimeError, match="a bug"):
            await server.drain(1.0)

    asyncio.run(play())
