"""/metrics over HTTP, on the service's event loop. Silent or slow clients are closed, and cost no thread."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator
from typing import cast

import uvicorn
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from isthmus.models.address import parse_address
from isthmus.models.errors import InvalidInput
from isthmus.protos.connections import BACKLOG, Connections

MAX_CONNECTIONS = 32  # Prometheus, its spare, and people who look
CLIENT_TIMEOUT_S = 5.0  # for the head of a request, and for reading the answer
CLOSE_S = 1  # for an answer that is being sent when the service ends


class MetricsServer(uvicorn.Server):
    """`port` is the bound one. `serve` it in a task; it ends soon after `should_exit` is set."""

    def __init__(self, address: str, registry: CollectorRegistry) -> None:
        """Binds. Raises InvalidInput when the address cannot be had."""
        try:
            parsed = parse_address(address)
            family = socket.AF_INET6 if ":" in parsed.host else socket.AF_INET
            self._socket = socket.create_server((parsed.host, parsed.port), family=family)
        except (InvalidInput, OSError) as error:
            raise InvalidInput(f"cannot serve metrics on {address}: {error}") from error
        self.port: int = self._socket.getsockname()[1]
        self._connections = Connections(MAX_CONNECTIONS, CLIENT_TIMEOUT_S)
        config = uvicorn.Config(
            application(registry),
            http=cast(type[asyncio.Protocol], self._connections.protocol),  # uvicorn only calls it
            ws="none",
            lifespan="off",
            backlog=BACKLOG,
            log_config=None,
            log_level="error",  # a client's nonsense is no event of ours, and might fill the disk
            timeout_graceful_shutdown=CLOSE_S,
        )
        super().__init__(config)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        asyncio.get_running_loop().set_exception_handler(self._connections.on_loop_error)
        await super().startup(sockets)

    async def run_until_exit(self) -> None:
        """Answer until `should_exit` is set."""
        await self.serve([self._socket])

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """The service handles signals itself."""
        yield


def application(registry: CollectorRegistry) -> Starlette:
    """GET and HEAD of /metrics, in the format that the client accepts; other paths are 404, other methods 405."""

    async def export(request: Request) -> Response:
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(registry), headers={"content-type": content_type})

    return Starlette(routes=[Route("/metrics", export)])
