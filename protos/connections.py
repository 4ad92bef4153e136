"""Open connections of the HTTP server: how many there may be, and how long a client may take.

    accepted -> head of a request -> body -> answer -> head of the next request ...
                within timeout_s              read within timeout_s

One connection too many closes another: the oldest that has sent no request, else the oldest whose body is incomplete.
Those that are being answered stay; admission slots bound them. So a health check always finds a place.
"""

from __future__ import annotations

import asyncio
import logging
import resource
import time
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

BACKLOG = 64  # connections accepted in one turn of the event loop, so beyond the limit for a moment
DESCRIPTORS_EACH = 4  # of the process: the others are for models, the cloud, and what was accepted just now
LOG_EVERY_S = 60.0

log = logging.getLogger("isthmus.http")


class Connections:
    """The open connections of one server, at most `most` of them."""

    def __init__(self, most: int, timeout_s: float) -> None:
        self.most = min(most, max(1, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // DESCRIPTORS_EACH))
        self.timeout_s = timeout_s
        self._open: dict[Connection, None] = {}  # oldest first
        self._logged_s = float("-inf")

    def __len__(self) -> int:
        return len(self._open)

    def protocol(self, **arguments: Any) -> Connection:
        """A new connection, as uvicorn's `http` setting makes one."""
        return Connection(self, **arguments)

    def add(self, connection: Connection) -> None:
        """Keep a connection, and close another one if it is one too many."""
        if len(self._open) >= self.most:
            silent = next((each for each in self._open if each.between_requests), None)
            uploading = next((each for each in self._open if each.uploading), None)
            (silent or uploading or connection).abort()
        if not connection.transport.is_closing():
            self._open[connection] = None

    def discard(self, connection: Connection) -> None:
        self._open.pop(connection, None)

    def on_loop_error(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Handler of the event loop's errors: those of `accept` come by thousands, and are logged once a minute."""
        if not str(context.get("message", "")).startswith("socket.accept()"):
            loop.default_exception_handler(context)
        elif time.monotonic() - self._logged_s >= LOG_EVERY_S:
            self._logged_s = time.monotonic()
            log.error("no connection can be accepted at the moment: %s", context.get("exception"))


class Connection(H11Protocol):
    """One connection. It is closed when a head does not arrive, or an answer is not read, within the timeout."""

    def __init__(self, connections: Connections, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._connections = connections
        self._timer: asyncio.TimerHandle | None = None

    @property
    def between_requests(self) -> bool:
        """Whether no request is under way: its head has not arrived, or it has been answered."""
        return self.cycle is None or self.cycle.response_complete

    @property
    def uploading(self) -> bool:
        """Whether the body of a request is incomplete."""
        return not self.between_requests and self.cycle.more_body

    def abort(self) -> None:
        """Close at once; what was not sent is lost."""
        self._connections.discard(self)
        self.transport.abort()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._start_timer()
        self._connections.add(self)

    def connection_lost(self, error: Exception | None) -> None:
        self._stop_timer()
        self._connections.discard(self)
        super().connection_lost(error)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if not self.between_requests:
            if not self.flow.write_paused:  # what a client sends is no sign that it reads
                self._stop_timer()
        elif self._timer is None:
            self._start_timer()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._start_timer()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_timer()

    def _start_timer(self) -> None:
        self._stop_timer()
        self._timer = self.loop.call_later(self._connections.timeout_s, self.abort)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
