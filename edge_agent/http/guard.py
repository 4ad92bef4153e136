"""What every request passes before the application: health check, origin, token, path, and the count at its end.

/healthz and /health are answered here, whatever else is refused or busy. Before an error is sent, what still comes of
the body is read and thrown away: closing a connection with unread bytes resets it, and the client never sees the error.
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.responses import JSONResponse, Response
from starlette.routing import Match, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from isthmus.edge_agent.http.metrics import HttpMetrics
from isthmus.edge_agent.http.origins import OriginPolicy

HEALTH_PATHS = ("/healthz", "/health")
OTHER = "other"  # label of paths without a route
TOO_SLOW = 408
CLIENT_LEFT = 499  # as nginx calls it
DISCARDED_BYTES = 64 << 20  # of a body that is refused; a larger one may see its connection reset


@dataclass
class Exchange:
    """One request's end of the connection, which sees how it ends."""

    receive_: Receive
    send_: Send
    timeout_s: float  # for the body of a request that is refused
    unread: bool  # whether the body is not known to have been read
    code: int = 500  # of a request that fails before its response begins
    complete: bool = False

    async def receive(self) -> Message:
        message = await self.receive_()
        self.unread = self.unread and message.get("more_body", False)
        if message["type"] == "http.disconnect" and not self.complete:
            self.code = CLIENT_LEFT
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start" and self.code != CLIENT_LEFT:
            self.code = message["status"]
            if self.code >= 400 and self.code != TOO_SLOW and self.unread:
                await self._discard_body()
        self.complete = message["type"] == "http.response.body" and not message.get("more_body", False)
        await self.send_(message)

    async def _discard_body(self) -> None:
        left = DISCARDED_BYTES
        with suppress(TimeoutError):
            async with asyncio.timeout(self.timeout_s):
                while self.unread and left > 0:
                    left -= len((await self.receive()).get("body", b""))


class Guard:
    """ASGI middleware around the application with these routes."""

    def __init__(
        self,
        app: ASGIApp,
        routes: Iterable[Route],
        origins: OriginPolicy,
        metrics: HttpMetrics,
        timeout_s: float,
        token: str = "",
    ) -> None:
        """`timeout_s`: for the body of a request that is refused. `token`: that clients must send; empty for none."""
        self._app, self._routes = app, tuple(routes)
        self._expected = f"Bearer {token}".encode() if token else b""
        self._origins, self._metrics, self._timeout_s = origins, metrics, timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        scope = {**scope, "path": scope["path"].rstrip("/") or "/"}  # with and without a slash at its end
        headers = Headers(scope=scope)
        unread = "expect" not in headers  # a client that asks first sends nothing when it is refused
        exchange = Exchange(receive, send, self._timeout_s, unread)
        try:
            await self._answer(scope, headers)(scope, exchange.receive, exchange.send)
        finally:
            self._metrics.count(self._label(scope), exchange.code)

    def _answer(self, scope: Scope, headers: Headers) -> ASGIApp:
        if scope["path"] in HEALTH_PATHS and scope["method"] in ("GET", "HEAD"):
            return JSONResponse({"status": "ok"})
        refusal = self._origins.refusal(scope["method"], headers)
        if refusal is not None:
            return problem(403, refusal)
        if not self._authorized(scope["method"], headers):
            return problem(401, "this agent asks for a token: Authorization: Bearer …", {"www-authenticate": "Bearer"})
        return self._app

    def _authorized(self, method: str, headers: Headers) -> bool:
        """Whether the token is right, or none is needed: browsers send none when they only ask what they may do."""
        if not self._expected or method == "OPTIONS":
            return True
        return hmac.compare_digest(headers.get("authorization", "").encode(), self._expected)

    def _label(self, scope: Scope) -> str:
        return next((route.path_format for route in self._routes if route.matches(scope)[0] != Match.NONE), OTHER)


def problem(code: int, message: str, headers: dict[str, str] | None = None) -> Response:
    """An error response."""
    return JSONResponse({"error": {"message": message, "code": code}}, status_code=code, headers=headers)
