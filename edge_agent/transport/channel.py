"""Opening a gRPC channel, and gRPC's errors as ours. Shared by the link and its streams."""

from __future__ import annotations

import ssl
from pathlib import Path

import grpc

from isthmus.edge_agent.config import Tls, proxy_variable
from isthmus.edge_agent.transport.tls_failures import plain_words
from isthmus.models.errors import InvalidInput, IsthmusError
from isthmus.protos import limits, status

GRPC_PREFIX_BYTES = 5  # flag and length before each message
# Of authorities that a system trusts, where OpenSSL itself names none: Debian and Alpine, Fedora.
SYSTEM_ROOTS = ("/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt")


def open_channel(target: str, tls: Tls | None) -> grpc.Channel:
    """A channel that notices half-open connections. It does not connect yet. Raises InvalidInput for a file of TLS."""
    if tls is None or not tls.on:
        return grpc.insecure_channel(target, limits.client_options())
    from isthmus.protos.certificates import read_pems  # cryptography takes 80 ms to import

    pems = read_pems(tls.certificate, tls.key, tls.ca or system_roots())
    credentials = grpc.ssl_channel_credentials(pems.roots, pems.key, pems.certificate)
    return grpc.secure_channel(target, credentials, limits.client_options())


def system_roots() -> Path:
    """The file of the authorities that this system trusts. Raises InvalidInput."""
    named = ssl.get_default_verify_paths().cafile  # which SSL_CERT_FILE sets
    for path in (named, *SYSTEM_ROOTS):
        if path is not None and Path(path).is_file():
            return Path(path)
    raise InvalidInput("this system has no file of trusted authorities: --tls-ca or SSL_CERT_FILE names one")


def rpc_error(failure: grpc.RpcError) -> IsthmusError:
    """The class of our error tree that a gRPC status stands for.

    A failed handshake is said in plain words. Where a proxy is set, a failed connection names it.
    """
    text = failure.details() or ""
    if failure.code() is grpc.StatusCode.UNAVAILABLE and (words := plain_words(text)):
        text = words
    elif failure.code() is grpc.StatusCode.UNAVAILABLE and (name := proxy_variable()):
        text = f"{name} is set, so gRPC connects through that proxy unless no_proxy names the cloud's host; {text}"
    return status.to_error(failure.code(), text)
