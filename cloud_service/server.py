"""A gRPC server with health, reflection and metrics: starting, and draining in order. Knows nothing about models."""

from __future__ import annotations

import asyncio
import logging
import signal
from dataclasses import dataclass
from typing import Protocol

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from prometheus_client import CollectorRegistry

from isthmus.cloud_service.authentication import Authentication, follow
from isthmus.cloud_service.config import CloudConfig
from isthmus.cloud_service.metrics import CloudMetrics
from isthmus.cloud_service.metrics_server import MetricsServer
from isthmus.cloud_service.servicer import SERVICE_NAME, Servicer, attach
from isthmus.cloud_service.tls import RotatingCertificate
from isthmus.models.address import Address, parse_address
from isthmus.models.errors import InvalidInput
from isthmus.protos import limits

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
ABORT_S = 1.0  # for what is aborted to end

log = logging.getLogger("isthmus.cloud")


@dataclass(frozen=True)
class Ports:
    """Ports that the service listens on."""

    grpc: int
    metrics: int | None

    def describe(self, config: CloudConfig) -> str:
        """Bound addresses, for the log."""
        grpc_address = Address(parse_address(config.listen).host, self.grpc)
        if config.metrics is None or self.metrics is None:
            return f"{grpc_address}, no metrics"
        return f"{grpc_address}, metrics on http://{Address(parse_address(config.metrics).host, self.metrics)}/metrics"


class Runner(Protocol):
    """Computes in the background until it is drained."""

    async def run(self) -> None: ...

    def drain(self) -> None: ...


class Server:
    """One service process. `stopping` is set by a signal, or when a runner ends by itself."""

    def __init__(
        self, servicer: Servicer, vision: Runner, language: Runner, metrics: CloudMetrics | None = None
    ) -> None:
        """Needs a running event loop. `metrics`: count devices that are refused."""
        self.stopping = asyncio.Event()
        self._servicer, self._vision, self._language = servicer, vision, language
        self._counts = metrics
        refuse = Authentication(servicer.access, metrics.auth_failed if metrics else lambda reason: None)
        self._server = grpc.aio.server(interceptors=(refuse,), options=limits.server_options())
        self._health = health.aio.HealthServicer()
        self._running: list[asyncio.Task[None]] = []
        self._metrics: MetricsServer | None = None
        attach(servicer, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection((SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server)

    async def start(self, config: CloudConfig, registry: CollectorRegistry) -> Ports:
        """Bind, start both runners and report SERVING. Raises InvalidInput when a port cannot be had."""
        certificate = RotatingCertificate(config.tls) if config.tls else None
        if certificate is not None and self._counts is not None:
            self._counts.watch_certificate(lambda: certificate.not_after_s)
        grpc_port = bind(self._server, config.listen, certificate)
        if config.metrics is not None:
            self._metrics = MetricsServer(config.metrics, registry)
            self._metrics_task = asyncio.create_task(self._metrics.run_until_exit())
        loop = asyncio.get_running_loop()
        for number in STOP_SIGNALS:
            signal.signal(number, lambda *_: loop.call_soon_threadsafe(self.stopping.set))
        self._running = [asyncio.create_task(runner.run()) for runner in (self._vision, self._language)]
        for task in self._running:
            task.add_done_callback(lambda _: self.stopping.set())  # or the service would look healthy without it
        self._ending_idle = asyncio.create_task(self._servicer.end_idle_streams())
        self._following = asyncio.create_task(follow(self._servicer.access, self._servicer.end_refused))
        await self._server.start()
        for name in ("", SERVICE_NAME):
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        return Ports(grpc_port, self._metrics.port if self._metrics else None)

    async def drain(self, grace_s: float) -> None:
        """Answer what is outstanding and stop, all within `grace_s`; what takes longer is aborted.

        Raises what a runner raised.
        """
        self._ending_idle.cancel()
        self._following.cancel()
        await self._health.enter_graceful_shutdown()
        self._servicer.drain()
        self._language.drain()
        try:
            async with asyncio.timeout(grace_s):
                await self._finish(grace_s)
        except TimeoutError:
            log.warning("some calls were not answered within %.1f s and are aborted", grace_s)
            await self._abort()
        if self._metrics is not None:
            self._metrics.should_exit = True
            await asyncio.wait([self._metrics_task], timeout=ABORT_S)
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)  # another one during interpreter shutdown would count as a crash

    async def _finish(self, grace_s: float) -> None:
        await self._servicer.drained()
        closing = asyncio.create_task(self._server.stop(grace_s))  # takes no more calls
        await asyncio.wait([closing], timeout=limits.GOODBYE_S)  # those that came in with the signal are still answered
        await self._servicer.drained()
        await self._server.stop(None)  # what is left watches health
        await closing
        self._vision.drain()
        await asyncio.gather(*self._running)

    async def _abort(self) -> None:
        await self._server.stop(None)
        for task in self._running:
            task.cancel()
        await asyncio.wait(self._running, timeout=ABORT_S)
        for task in self._running:
            if task.done() and not task.cancelled():
                task.result()


def bind(server: grpc.aio.Server, address: str, certificate: RotatingCertificate | None) -> int:
    """Bind to an address and return the port. Raises InvalidInput when it is taken."""
    try:
        if certificate is None:
            return int(server.add_insecure_port(address))
        return int(server.add_secure_port(address, certificate.credentials()))
    except (RuntimeError, OSError) as error:
        raise InvalidInput(f"cannot listen on {address}: {str(error).splitlines()[0]}") from error
