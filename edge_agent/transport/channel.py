"""Opening a gRPC channel, and gRPC's errors as ours. Shared by the link and its streams."""

from __future__ import annotations

import grpc

from isthmus.edge_agent.config import Tls, proxy_variable
from isthmus.models.errors import IsthmusError
from isthmus.protos import limits, status

GRPC_PREFIX_BYTES = 5  # flag and length before each message


def open_channel(target: str, tls: Tls | None) -> grpc.Channel:
    """A channel that notices half-open connections. It does not connect yet."""
    if tls is None:
        return grpc.insecure_channel(target, limits.client_options())
    key = tls.key.read_bytes() if tls.key else None
    certificate = tls.certificate.read_bytes() if tls.certificate else None
    credentials = grpc.ssl_channel_credentials(tls.ca.read_bytes(), key, certificate)
    return grpc.secure_channel(target, credentials, limits.client_options())


def rpc_error(failure: grpc.RpcError) -> IsthmusError:
    """The class of our error tree that a gRPC status stands for. Where a proxy is set, a failed connection names it."""
    text = failure.details() or ""
    if failure.code() is grpc.StatusCode.UNAVAILABLE and (name := proxy_variable()):
        text = f"{name} is set, so gRPC connects through that proxy unless no_proxy names the cloud's host; {text}"
    return status.to_error(failure.code(), text)
