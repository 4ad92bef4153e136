"""`cloud-service doctor`: what keeps this service from working well, and what to do about it."""

from __future__ import annotations

import socket
from collections.abc import Iterator

from isthmus.cloud_service.access import read_access
from isthmus.cloud_service.config import CloudConfig, Tls
from isthmus.models.address import is_loopback, parse_address
from isthmus.models.language.handoff.manifest import HandoffManifest
from isthmus.models.vision.manifest import Manifest
from isthmus.protos.certificates import names_of, read_pems
from isthmus.protos.diagnosis import (
    Finding,
    attempt,
    look_at_bundle,
    look_at_certificate,
    look_at_clock,
    look_at_secrecy,
)


def findings(config: CloudConfig) -> Iterator[Finding]:
    yield Finding("settings", "ok", "valid")
    yield look_at_clock()
    for folder in config.bundles:
        yield look_at_bundle(folder, Manifest)
    for folder in config.handoffs:
        yield look_at_bundle(folder, HandoffManifest)
    if not config.bundles and not config.models and config.engine is None:
        fix = "give --bundle, --model or --engine-url"
        yield Finding("models", "wrong", "there is nothing to serve", fix)
    yield from look_at_tls(config.tls)
    if config.access is not None:
        path = config.access
        fix = "`cloud-service keys init` makes one"
        yield attempt(f"devices {path}", lambda: f"{len(read_access(path).tokens)} devices have tokens", fix)
    if not is_loopback(parse_address(config.listen).host) and config.insecure_listen:
        yield Finding("listen", "warning", f"{config.listen} is open to everyone", "use TLS and --access")
    for name, address in (("listen", config.listen), ("metrics", config.metrics)):
        if address is not None:
            yield look_at_port(name, address)


def look_at_tls(tls: Tls | None) -> Iterator[Finding]:
    if tls is None:
        yield Finding("tls", "warning", "off: photos cross in plain text", "`cloud-service keys init` makes the files")
        return

    def check() -> str:
        own = read_pems(tls.certificate, tls.key, tls.client_ca).certificates[0]
        return f"for {', '.join(names_of(own)) or 'no name'}: devices must call the service by one of these"

    yield attempt("tls", check, "give a certificate, its own key, and an authority")
    for path in (tls.certificate, tls.client_ca):
        if path is not None:
            yield look_at_certificate(path)
    yield look_at_secrecy(tls.key)


def look_at_port(name: str, address: str) -> Finding:
    """Whether the address can be had; a running service has it already."""
    parsed = parse_address(address)
    family = socket.AF_INET6 if ":" in parsed.host else socket.AF_INET
    try:
        with socket.create_server((parsed.host, parsed.port), family=family):
            return Finding(name, "ok", f"{address} is free")
    except OSError as error:
        fix = f"nothing if this service runs already; else end what listens there, or give another --{name}"
        return Finding(name, "warning", f"{address}: {(error.strerror or str(error)).lower()}", fix)
