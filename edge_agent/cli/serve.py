"""The HTTP server of `edge-agent run`: announces its address once it is bound, and ends without cutting a request.

    connections     -> at most so many, and slow ones are closed (protos.connections)
    SIGTERM, SIGINT -> no connection is accepted any more; answers carry `Connection: close`
        QUIET_S     -> connections without a request are closed
        drain_s     -> requests that are still running are cancelled

Knows nothing about what is served.
"""

from __future__ import annotations

import asyncio
import math
import signal
import socket
import sys
from collections.abc import Callable
from typing import cast

import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from isthmus.edge_agent.config import HttpConfig
from isthmus.models.address import Address, parse_address
from isthmus.protos.connections import BACKLOG, Connections

KEEP_ALIVE_S = 30  # of a connection without a request
QUIET_S = 1.0  # for requests that are on their way to an open connection when the signal comes
POLL_S = 0.05


class Server(uvicorn.Server):
    """One application on one address. `announce` is called with the bound address."""

    def __init__(self, app: ASGIApp, http: HttpConfig, announce: Callable[[Address], None]) -> None:
        self._app, self._announce = app, announce
        self._address, self._drain_s = parse_address(http.listen), http.drain_s
        self._connections = Connections(http.max_connections, http.client_timeout_s)
        config = uvicorn.Config(
            self._answer,
            host=self._address.host,
            port=self._address.port,
            interface="asgi3",
            http=cast(type[asyncio.Protocol], self._connections.protocol),  # uvicorn only calls it
            ws="none",
            backlog=BACKLOG,
            log_level="error",  # a client's nonsense is no event of ours, and might fill the disk
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=math.ceil(http.drain_s),
        )
        super().__init__(config)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        asyncio.get_running_loop().set_exception_handler(self._connections.on_loop_error)
        await super().startup(sockets)
        port = self.servers[0].sockets[0].getsockname()[1]
        self._announce(Address(self._address.host, port))

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await self._stop_accepting()
        loop = asyncio.get_running_loop()
        quiet_s = loop.time() + min(QUIET_S, self._drain_s)
        while self.server_state.connections and loop.time() < quiet_s and not self.force_exit:
            await asyncio.sleep(POLL_S)
        await super().shutdown(sockets)

    async def _stop_accepting(self) -> None:
        """Connections that were accepted in this moment are set up before their server is closed, which resets them."""
        loop = asyncio.get_running_loop()
        for server in self.servers:
            for listener in server.sockets:
                loop.remove_reader(listener.fileno())
        await asyncio.sleep(0)
        for server in self.servers:
            server.close()

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_closing(message: Message) -> None:
            if self.should_exit and message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), (b"connection", b"close")]}
            await send(message)

        await self._app(scope, receive, send_closing)


def serve(app: ASGIApp, http: HttpConfig, announce: Callable[[Address], None]) -> None:
    """Serve until SIGTERM or SIGINT. Raises SystemExit then, so that the caller's contexts are closed."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # uvicorn raises the signal again when it has drained
    Server(app, http, announce).run()
