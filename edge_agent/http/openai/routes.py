"""Routes of the OpenAI-compatible HTTP API of a language model.

POST /v1/chat/completions   POST /v1/completions     with `stream` as server-sent events
GET  /v1/models             GET  /v1/models/{id}
"""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from isthmus.edge_agent.http.openai.endpoint import Endpoint, error_response
from isthmus.edge_agent.http.openai.jobs import chat_job, completion_job
from isthmus.edge_agent.http.openai.model_names import available_models, model_list, model_object, unknown_model
from isthmus.edge_agent.http.openai.state import DEFAULT_LIMITS, ApiState, Limits
from isthmus.edge_agent.language.request import GenerationBackend


def routes(backend: GenerationBackend, limits: Limits = DEFAULT_LIMITS) -> list[Route]:
    """The routes, to be mounted in an application."""
    state = ApiState(backend, limits)

    async def models(request: Request) -> Response:
        return JSONResponse(model_list(backend, state.created))

    async def model(request: Request) -> Response:
        name, available = request.path_params["id"], available_models(backend)
        if name not in available:
            return error_response(unknown_model(name, available))
        return JSONResponse(model_object(name, state.created))

    return [
        Route("/v1/chat/completions", Endpoint(state, chat_job)),
        Route("/v1/completions", Endpoint(state, completion_job)),
        Route("/v1/models", models),
        Route("/v1/models/{id:path}", model),
    ]
