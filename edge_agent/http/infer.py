"""HTTP endpoints for photos. Knows nothing about models or the link beyond EdgeAgent.

POST /v1/infer    body: a JPEG, PNG or WebP file -> the answer as JSON; ?deadline_ms=
                  ?task= names a task, repeatable; ?tap= ?width= ?rate= force a split at that operating point
GET  /v1/status   bundle, circuit breaker, link estimates
"""

from __future__ import annotations

import asyncio
import math
import time
from functools import partial
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from isthmus.edge_agent.config import MAX_DEADLINE_S, MIN_DEADLINE_S
from isthmus.edge_agent.vision.agent import EdgeAgent
from isthmus.edge_agent.vision.metrics import EdgeMetrics
from isthmus.models.errors import InvalidInput, Overloaded
from isthmus.models.settings import MAX_SHOWN, nearest
from isthmus.protos.limits import MAX_IMAGE_BYTES

MAX_ADMITTED = 32  # requests at once; above it 503, because a queue on a device only makes answers late
MAX_COMPUTING = 4  # of them in threads; ONNX Runtime uses every core for each
PARAMETERS = ("deadline_ms", "task", "tap", "width", "rate")
MAX_BODY_BYTES = 4 * MAX_IMAGE_BYTES  # an original from a camera; it is made smaller before it is sent on


class InferApi:
    """Handlers over one agent, with a limited number of admission slots."""

    def __init__(self, agent: EdgeAgent, metrics: EdgeMetrics) -> None:
        self._agent = agent
        self._metrics = metrics
        self._admitted = 0
        self._computing = asyncio.Semaphore(MAX_COMPUTING)

    @property
    def routes(self) -> list[Route]:
        return [Route("/v1/infer", self.infer, methods=["POST"]), Route("/v1/status", self.status)]

    def update_metrics(self) -> None:
        """Export the current state of the link."""
        self._metrics.link(self._agent.link)

    async def infer(self, request: Request) -> Response:
        if self._admitted >= MAX_ADMITTED:
            return problem(503, f"{MAX_ADMITTED} photos are being answered already", {"Retry-After": "1"})
        self._admitted += 1
        received_s = time.monotonic()
        try:
            arguments = query(request)
            photo = await body(request)
            async with self._computing:
                if "deadline_s" in arguments:  # the upload and the wait for a thread count
                    left_s = arguments["deadline_s"] - (time.monotonic() - received_s)
                    arguments["deadline_s"] = max(left_s, MIN_DEADLINE_S)
                answer = await run_in_threadpool(partial(self._agent.infer, photo, **arguments))
            return JSONResponse(answer.as_dict())
        except TooLarge as error:
            return problem(413, str(error))
        except InvalidInput as error:
            self._metrics.refused()
            return problem(400, str(error))
        except Overloaded as error:
            return problem(503, str(error), {"Retry-After": "1"})
        except ClientDisconnect:
            return Response(status_code=499)
        finally:
            self._admitted -= 1

    async def status(self, request: Request) -> Response:
        manifest, link = self._agent.manifest, self._agent.link
        estimate = link.estimate if link else None
        taps = {
            tap.name: {"widths": [w.width for w in tap.widths], "rates": len(tap.widths[0].rates)}
            for tap in manifest.taps
        }
        return JSONResponse(
            {
                "bundle": {
                    "name": manifest.name,
                    "fingerprint": manifest.fingerprint,
                    "tasks": {task.name: task.labels for task in manifest.tasks},
                    "taps": taps,
                },
                "mode": self._agent.config.mode,
                "objective": self._agent.config.objective,
                "exit_confidence": self._agent.goal.exit_confidence,
                "cloud": link.state if link else None,
                "cloud_problem": link.refusal if link else None,
                "link": {"rtt_s": estimate.rtt_s, "bytes_per_s": estimate.bytes_per_s} if estimate else None,
            }
        )


class TooLarge(Exception):
    """The body is larger than MAX_BODY_BYTES."""


async def body(request: Request) -> bytes:
    """The body, read no further than the cap. Raises TooLarge, or InvalidInput if it is empty."""
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > MAX_BODY_BYTES:
            raise TooLarge(f"the body is larger than {MAX_BODY_BYTES} bytes")
    if not data:
        raise InvalidInput("the body is empty, expected a JPEG, PNG or WebP file")
    return bytes(data)


def query(request: Request) -> dict[str, Any]:
    """The query as arguments of `EdgeAgent.infer`, which checks names itself. Raises InvalidInput."""
    given = request.query_params
    for name in given:
        if name not in PARAMETERS:
            raise InvalidInput(f"unknown query parameter {ascii(name)[:MAX_SHOWN]}{nearest(name, PARAMETERS)}")
    arguments: dict[str, Any] = {"tasks": given.getlist("task") or None, "tap": given.get("tap")}
    if "deadline_ms" in given:
        arguments["deadline_s"] = (
            number(given["deadline_ms"], "deadline_ms", 1000 * MIN_DEADLINE_S, 1000 * MAX_DEADLINE_S) / 1000
        )
    if "width" in given:
        arguments["width"] = number(given["width"], "width", 0, 1)
    if "rate" in given:
        if not (rate := given["rate"]).isdecimal() or len(rate) > 9:
            raise InvalidInput(f"rate is {rate[:20]!r}, expected a whole number")
        arguments["rate"] = int(rate)
    return arguments


def number(text: str, name: str, least: float, most: float) -> float:
    """`text` as a number. Raises InvalidInput unless it is one within these bounds."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not least <= value <= most:
        raise InvalidInput(f"{name} is {text[:20]!r}, expected {least:g} to {most:g}")
    return value


def problem(code: int, message: str, headers: dict[str, str] | None = None) -> JSONResponse:
    """An error response."""
    return JSONResponse({"error": {"message": message, "code": code}}, status_code=code, headers=headers)
