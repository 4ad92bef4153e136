"""Map isthmus.models.errors to gRPC status codes and back. Tests check that both directions are complete."""

from __future__ import annotations

import grpc

from isthmus.models import errors
from isthmus.protos.limits import MAX_ERROR_CHARACTERS

# The order does not matter: an error's own class is looked up first, then its bases.
CODES: dict[type[errors.IsthmusError], grpc.StatusCode] = {
    errors.CallerError: grpc.StatusCode.INVALID_ARGUMENT,
    errors.InvalidInput: grpc.StatusCode.INVALID_ARGUMENT,
    errors.ContextExceeded: grpc.StatusCode.INVALID_ARGUMENT,
    errors.InvalidGrammar: grpc.StatusCode.INVALID_ARGUMENT,
    errors.BundleError: grpc.StatusCode.INTERNAL,  # of the service's own bundle, not the caller's fault
    errors.ContextGone: grpc.StatusCode.ABORTED,
    errors.PayloadCorrupt: grpc.StatusCode.DATA_LOSS,
    errors.PayloadTooLarge: grpc.StatusCode.OUT_OF_RANGE,
    errors.AgentClosed: grpc.StatusCode.INVALID_ARGUMENT,
    errors.OverBudget: grpc.StatusCode.INVALID_ARGUMENT,
    errors.AnswerCancelled: grpc.StatusCode.INVALID_ARGUMENT,
    errors.LinkError: grpc.StatusCode.UNAVAILABLE,
    errors.LinkDown: grpc.StatusCode.UNAVAILABLE,
    errors.DeadlineExceeded: grpc.StatusCode.DEADLINE_EXCEEDED,
    errors.ServiceError: grpc.StatusCode.INTERNAL,
    errors.Overloaded: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.Draining: grpc.StatusCode.UNAVAILABLE,
    errors.EngineFault: grpc.StatusCode.INTERNAL,
    errors.EngineDown: grpc.StatusCode.UNAVAILABLE,
    errors.PeerError: grpc.StatusCode.INTERNAL,
    errors.InvalidReply: grpc.StatusCode.INTERNAL,
    errors.Refused: grpc.StatusCode.PERMISSION_DENIED,
    errors.UnknownBundle: grpc.StatusCode.NOT_FOUND,
    errors.Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
    errors.UnsupportedVersion: grpc.StatusCode.FAILED_PRECONDITION,
    errors.IsthmusError: grpc.StatusCode.INTERNAL,
}

ERRORS: dict[grpc.StatusCode, type[errors.IsthmusError]] = {
    grpc.StatusCode.CANCELLED: errors.LinkDown,
    grpc.StatusCode.UNKNOWN: errors.ServiceError,
    grpc.StatusCode.INVALID_ARGUMENT: errors.InvalidInput,
    grpc.StatusCode.DEADLINE_EXCEEDED: errors.DeadlineExceeded,
    grpc.StatusCode.NOT_FOUND: errors.UnknownBundle,
    grpc.StatusCode.ALREADY_EXISTS: errors.InvalidInput,
    grpc.StatusCode.PERMISSION_DENIED: errors.Refused,
    grpc.StatusCode.UNAUTHENTICATED: errors.Unauthenticated,
    grpc.StatusCode.RESOURCE_EXHAUSTED: errors.Overloaded,
    grpc.StatusCode.FAILED_PRECONDITION: errors.UnsupportedVersion,
    grpc.StatusCode.ABORTED: errors.ContextGone,
    grpc.StatusCode.UNIMPLEMENTED: errors.UnsupportedVersion,
    grpc.StatusCode.OUT_OF_RANGE: errors.PayloadTooLarge,
    grpc.StatusCode.INTERNAL: errors.ServiceError,
    grpc.StatusCode.UNAVAILABLE: errors.LinkDown,
    grpc.StatusCode.DATA_LOSS: errors.PayloadCorrupt,
}


def of_error(error: Exception) -> tuple[grpc.StatusCode, str]:
    """The status code and the one line that the caller may see. Foreign errors become INTERNAL without their text."""
    for kind in type(error).__mro__:
        if kind in CODES:
            code = CODES[kind]
            if code is grpc.StatusCode.INTERNAL:
                return code, "the service failed on this input"
            return code, str(error)[:MAX_ERROR_CHARACTERS]
    return grpc.StatusCode.INTERNAL, "the service failed on this input"


def to_error(code: grpc.StatusCode, text: str) -> errors.IsthmusError:
    """The error for a status received from the cloud."""
    kind = ERRORS.get(code, errors.ServiceError)
    return kind(f"cloud: {code.name}: {text[:MAX_ERROR_CHARACTERS]}")


def code_of(number: int) -> grpc.StatusCode:
    """A status code from its number on the wire; UNKNOWN for one that does not exist."""
    for code in grpc.StatusCode:
        if code.value[0] == number:
            return code
    return grpc.StatusCode.UNKNOWN
