"""Routes of the page: `/` and `/page/NAME`, files of the package that are read once. Nothing comes from elsewhere.

The page uses the agent by its HTTP API alone. Its policy allows no inline script, no inline style, no other host
and no frame around it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib.resources import files

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

KINDS = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' blob:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
    )
)
HEADERS = {
    "Cache-Control": "no-cache",  # asked for again each time, and not sent again while it is the same
    "Content-Security-Policy": POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(self), microphone=(), geolocation=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def page_routes() -> list[Route]:
    """`/` and `/page/NAME`. Names are looked up in what was read before, so no path leads out of the folder."""
    folder = files("isthmus.edge_agent.http.page") / "static"
    found = {each.name: static(each.name, each.read_bytes()) for each in folder.iterdir() if kind_of(each.name)}

    async def index(request: Request) -> Response:
        return found["index.html"].answer(request)

    async def part(request: Request) -> Response:
        if (file := found.get(request.path_params["name"])) is None:
            raise HTTPException(404)
        return file.answer(request)

    return [Route("/", index), Route("/page/{name}", part)]


@dataclass(frozen=True, slots=True)
class StaticFile:
    """One file, and the tag by which a client asks whether it has changed."""

    data: bytes
    kind: str
    tag: str

    def answer(self, request: Request) -> Response:
        """The file, or 304 where the client has it."""
        headers = {**HEADERS, "ETag": self.tag}
        if self.tag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        return Response(self.data, media_type=self.kind, headers=headers)


def static(name: str, data: bytes) -> StaticFile:
    return StaticFile(data, kind_of(name), f'"{hashlib.sha256(data).hexdigest()[:32]}"')


def kind_of(name: str) -> str:
    """The media type by the name's ending; empty for what is not served."""
    return KINDS.get(name.rpartition(".")[2], "")
