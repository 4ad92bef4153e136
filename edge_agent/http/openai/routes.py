"""Routes of the HTTP APIs of a language model: OpenAI's, and the three of Ollama's that its clients begin with.

POST /v1/chat/completions   POST /v1/completions   POST /v1/responses     with `stream` as server-sent events
GET  /v1/models             GET  /v1/models/{id}
POST /api/chat              POST /api/generate     GET  /api/tags         a stream is one JSON object a line
"""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from isthmus.edge_agent.http.openai.chat_jobs import chat_job
from isthmus.edge_agent.http.openai.completion_jobs import completion_job
from isthmus.edge_agent.http.openai.dialect import OpenAiDialect
from isthmus.edge_agent.http.openai.endpoint import Endpoint, error_response
from isthmus.edge_agent.http.openai.errors import ApiError
from isthmus.edge_agent.http.openai.model_names import available_models, model_list, model_object, unknown_model
from isthmus.edge_agent.http.openai.ollama import OllamaDialect, ollama_tags
from isthmus.edge_agent.http.openai.responses_api import ResponsesDialect
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

    async def tags(request: Request) -> Response:
        return JSONResponse(ollama_tags(available_models(backend), state.created))

    async def embeddings(request: Request) -> Response:
        message = "/v1/embeddings is not supported: no model of this agent is of kind embed"
        return error_response(ApiError(404, message, code="unsupported_endpoint"))

    return [
        Route("/v1/embeddings", embeddings, methods=["POST"]),
        Route("/v1/chat/completions", Endpoint(state, OpenAiDialect(chat_job))),
        Route("/v1/completions", Endpoint(state, OpenAiDialect(completion_job))),
        Route("/v1/responses", Endpoint(state, ResponsesDialect())),
        Route("/api/chat", Endpoint(state, OllamaDialect("chat"))),
        Route("/api/generate", Endpoint(state, OllamaDialect("generate"))),
        Route("/api/tags", tags),
        Route("/v1/models", models),
        Route("/v1/models/{id:path}", model),
    ]
