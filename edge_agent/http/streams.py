"""HTTP endpoints for cameras that `edge-agent watch` watches.

GET /v1/streams                     counts of each camera, and its last answered frame as its line of results
GET /v1/streams/{camera}/picture    that frame as a JPEG with boxes and labels

A viewer asks for the next picture when it has the last: one that is slow sees fewer, and holds up nobody.
"""

from __future__ import annotations

from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from isthmus.edge_agent.streams.view import StreamView

HEADERS = {
    "Cache-Control": "no-cache",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
}


def stream_routes(view: StreamView) -> list[Route]:
    async def streams(request: Request) -> Response:
        return JSONResponse({"streams": view.status()})

    async def picture(request: Request) -> Response:
        found = await run_in_threadpool(view.picture, request.path_params["camera"])
        if found is None:
            raise HTTPException(404, "no frame of a camera of this name is answered yet")
        index, data = found
        headers = {**HEADERS, "ETag": f'"{index}-{len(data)}"'}
        if headers["ETag"] == request.headers.get("if-none-match"):
            return Response(status_code=304, headers=headers)
        return Response(data, media_type="image/jpeg", headers=headers)

    return [Route("/v1/streams", streams), Route("/v1/streams/{camera}/picture", picture)]
