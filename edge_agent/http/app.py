"""The agent's local HTTP API. Knows nothing about models or the link beyond EdgeAgent.

POST /v1/infer    body: a JPEG, PNG or WebP file -> the answer as JSON; ?deadline_ms=
                  ?task= names a task, repeatable; ?tap= ?width= ?rate= have the photo encoded so and sent
GET  /v1/status   bundle, breaker, link estimates
     /v1/chat/completions, /v1/completions, /v1/models   see openai_api, with a language model
GET  /healthz     200 as long as the agent can answer, with or without a cloud
GET  /metrics     Prometheus
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from isthmus.edge_agent.vision.agent import EdgeAgent
from isthmus.edge_agent.vision.metrics import EdgeMetrics
from isthmus.models.errors import InvalidInput
from isthmus.protos.limits import MAX_IMAGE_BYTES

MAX_WAITING = 32  # photos in the house at once; above it 503, because a queue on a device only makes answers late
MAX_COMPUTING = 4  # of them in threads; ONNX Runtime uses every core for each
MAX_BODY_BYTES = 4 * MAX_IMAGE_BYTES  # a camera's own file; it is made smaller before it travels


class Api:
    """Handlers over one agent."""

    def __init__(self, agent: EdgeAgent, metrics: EdgeMetrics) -> None:
        self._agent = agent
        self._metrics = metrics
        self._waiting = 0
        self._places = asyncio.Semaphore(MAX_COMPUTING)

    async def infer(self, request: Request) -> Response:
        if self._waiting >= MAX_WAITING:
            return problem(503, f"{MAX_WAITING} photos are being answered already", {"Retry-After": "1"})
        self._waiting += 1
        try:
            wishes = query(request)
            photo = await body(request)
            async with self._places:
                answer = await run_in_threadpool(partial(self._agent.infer, photo, **wishes))
            return JSONResponse(answer.as_dict())
        except TooLarge as error:
            return problem(413, str(error))
        except InvalidInput as error:
            self._metrics.refused()
            return problem(400, str(error))
        except ClientDisconnect:
            return Response(status_code=499)
        finally:
            self._waiting -= 1

    async def status(self, request: Request) -> Response:
        manifest, link = self._agent.manifest, self._agent.link
        estimate = link.estimate if link else None
        return JSONResponse(
            {
                "bundle": {
                    "name": manifest.name,
                    "fingerprint": manifest.fingerprint,
                    "tasks": {task.name: task.labels for task in manifest.tasks},
                    "taps": {
                        tap.name: {"widths": [w.width for w in tap.widths], "rates": len(tap.widths[0].rates)}
                        for tap in manifest.taps
                    },
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
    """A body over MAX_BODY_BYTES."""


def create_app(
    registry: CollectorRegistry,
    photos: tuple[EdgeAgent, EdgeMetrics] | None = None,
    language: Sequence[Route] = (),
) -> Starlette:
    """The ASGI application: for photos, for a language model, or for both."""
    routes = [Route("/healthz", health), *language]
    if photos is not None:
        api = Api(*photos)
        routes += [Route("/v1/infer", api.infer, methods=["POST"]), Route("/v1/status", api.status)]

    async def export(request: Request) -> Response:
        if photos is not None:
            agent, metrics = photos
            metrics.link(agent.link)
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    return Starlette(routes=[*routes, Route("/metrics", export)], exception_handlers={HTTPException: plain})


async def health(request: Request) -> Response:
    return JSONResponse({"status": "ok"})


def plain(request: Request, error: Exception) -> Response:
    """Unknown paths and methods, in the shape of every other error."""
    assert isinstance(error, HTTPException)  # the only class it is registered for
    return problem(error.status_code, error.detail, dict(error.headers or {}))


async def body(request: Request) -> bytes:
    """The body, read no further than the cap. Raises TooLarge, InvalidInput when it is empty."""
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > MAX_BODY_BYTES:
            raise TooLarge(f"the body is larger than {MAX_BODY_BYTES} bytes")
    if not data:
        raise InvalidInput("the body is empty, expected a JPEG, PNG or WebP file")
    return bytes(data)


def query(request: Request) -> dict[str, Any]:
    """Arguments of `EdgeAgent.infer` from the query. Raises InvalidInput; names are the agent's to check."""
    given = request.query_params
    wishes: dict[str, Any] = {"tasks": given.getlist("task") or None, "tap": given.get("tap")}
    if "deadline_ms" in given:
        wishes["deadline_s"] = number(given["deadline_ms"], "deadline_ms", 1, 600_000) / 1000
    if "width" in given:
        wishes["width"] = number(given["width"], "width", 0, 1)
    if "rate" in given:
        if not (rate := given["rate"]).isdecimal() or len(rate) > 9:
            raise InvalidInput(f"rate is {rate[:20]!r}, expected a whole number")
        wishes["rate"] = int(rate)
    return wishes


def number(text: str, name: str, least: float, most: float) -> float:
    """Raises InvalidInput unless `text` is a number within these bounds."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not least <= value <= most:
        raise InvalidInput(f"{name} is {text[:20]!r}, expected {least} to {most}")
    return value


def problem(code: int, message: str, headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse({"error": {"message": message, "code": code}}, status_code=code, headers=headers)
