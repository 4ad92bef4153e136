"""The agent's local HTTP API: composes the endpoints of photos and of a language model into one application.

/v1/infer                                           see infer, with a vision bundle
GET /v1/streams, …                                  see streams, with cameras
GET /v1/status                                      of both: bundles, whether the cloud answers, link estimates
/v1/chat/completions, /v1/completions, /v1/models   see openai.routes, with a language model
GET /healthz, /health                               200 as long as the agent can answer, with or without a cloud
GET /metrics                                        Prometheus
GET /, /page/…                                      see page.routes: a page to look at

Every request passes the guard first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from isthmus.edge_agent.config import HttpConfig
from isthmus.edge_agent.http.guard import HEALTH_PATHS, Guard, problem
from isthmus.edge_agent.http.infer import InferApi
from isthmus.edge_agent.http.metrics import HttpMetrics
from isthmus.edge_agent.http.origins import OriginPolicy
from isthmus.edge_agent.http.page.routes import page_routes
from isthmus.edge_agent.http.streams import stream_routes
from isthmus.edge_agent.streams.view import StreamView
from isthmus.edge_agent.vision.agent import EdgeAgent
from isthmus.edge_agent.vision.metrics import EdgeMetrics

DEFAULTS = HttpConfig()


def create_app(
    registry: CollectorRegistry,
    photos: tuple[EdgeAgent, EdgeMetrics] | None = None,
    language: Sequence[Route] = (),
    http: HttpConfig = DEFAULTS,
    language_status: Callable[[], dict[str, Any]] | None = None,
    streams: StreamView | None = None,
) -> Starlette:
    """The ASGI application: for photos, for a language model, or for both, and of cameras.

    `language_status`: what /v1/status adds.
    """
    api = InferApi(*photos, http) if photos is not None else None

    async def export(request: Request) -> Response:
        if api is not None:
            api.update_metrics()
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    async def status(request: Request) -> Response:
        both = {**(api.status() if api else {}), **({"language": language_status()} if language_status else {})}
        return JSONResponse({**both, **({"streams": streams.cameras} if streams else {})})

    own = [Route("/v1/status", status)] if api or language_status else []
    routes = [
        *(Route(path, health) for path in HEALTH_PATHS),
        *language,
        *(api.routes if api else ()),
        *own,
        *(stream_routes(streams) if streams else ()),
        *page_routes(),
        Route("/metrics", export),
    ]
    metrics = HttpMetrics(registry, [route.path_format for route in routes])
    origins = OriginPolicy(http.listen, http.allowed_hosts, http.allowed_origins)
    guard = Middleware(
        Guard,
        routes=routes,
        origins=origins,
        metrics=metrics,
        timeout_s=http.client_timeout_s,
        token=http.secret,
    )
    return Starlette(
        routes=routes, middleware=[guard, *cross_origin(http)], exception_handlers={HTTPException: http_problem}
    )


def cross_origin(http: HttpConfig) -> list[Middleware]:
    """What tells browsers that pages of the allowed origins may read answers; nothing where none is allowed."""
    if not http.allowed_origins:
        return []
    return [
        Middleware(
            CORSMiddleware,
            allow_origins=http.allowed_origins,
            allow_methods=("GET", "POST"),
            allow_headers=("*",),
            allow_private_network=True,
        )
    ]


async def health(request: Request) -> Response:
    """For the list of routes; the guard answers before."""
    return JSONResponse({"status": "ok"})


def http_problem(request: Request, error: Exception) -> Response:
    """Unknown paths and methods, as error responses of the same shape as all others."""
    assert isinstance(error, HTTPException)  # the only class it is registered for
    return problem(error.status_code, error.detail, dict(error.headers or {}))
