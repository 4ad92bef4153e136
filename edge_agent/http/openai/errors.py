"""Errors of the OpenAI-compatible API: our exceptions translated to HTTP statuses and OpenAI's error object.

Knows nothing about how a response is sent.
"""

from __future__ import annotations

import logging

from isthmus.edge_agent.http.uploads import UploadRefused
from isthmus.models.errors import (
    ContextExceeded,
    DeadlineExceeded,
    InvalidGrammar,
    InvalidInput,
    LinkError,
    OverBudget,
    ServiceError,
)

# What clients look for: by the code, or, as LiteLLM, by OpenAI's words.
CONTEXT_CODE, TOO_LONG = "context_length_exceeded", "this model's maximum context length is"

log = logging.getLogger("isthmus.edge")


class ApiError(Exception):
    """A request that was refused or failed. `error` is OpenAI's error object, `status` the HTTP status."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        type: str = "invalid_request_error",
    ) -> None:
        super().__init__(message)
        self.status = status
        self.error = {"message": message, "type": type, "param": param, "code": code}


def translate(error: Exception, grammar_field: str = "response_format") -> ApiError:
    """The API error for any exception. An unexpected one is logged, and its message is not revealed."""
    match error:
        case ApiError():
            return error
        case UploadRefused():
            kind = "overloaded" if error.status == 503 else "invalid_request_error"
            return ApiError(error.status, str(error), code=error.code, type=kind)
        case ContextExceeded():
            return ApiError(400, str(error), code=CONTEXT_CODE)
        case InvalidGrammar():
            return ApiError(400, f"{grammar_field}: {error}", param=grammar_field, code="invalid_json_schema")
        case OverBudget():
            return ApiError(429, str(error), type="insufficient_quota", code="budget_exhausted")
        case InvalidInput():
            return ApiError(400, str(error))
        case DeadlineExceeded():
            return ApiError(504, str(error), type="timeout", code="deadline_exceeded")
        case LinkError():
            return ApiError(503, str(error), type="overloaded", code="cloud_unavailable")
        case ServiceError():
            return ApiError(503, str(error), type="overloaded", code="overloaded")
    log.error("a request failed", exc_info=error)
    message = "the agent failed to answer because of an internal error; see its log"
    return ApiError(500, message, type="server_error", code="internal_error")
