"""`edge-agent doctor`: what keeps this device from working well, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click

from isthmus.edge_agent.cli.settings import settings
from isthmus.edge_agent.config import EdgeConfig, HttpConfig, Tls, proxy_variable
from isthmus.models.bundle.files import read_manifest
from isthmus.models.errors import IsthmusError
from isthmus.models.options import Command, read
from isthmus.models.vision.manifest import Manifest
from isthmus.protos.diagnosis import (
    Finding,
    attempt,
    look_at_bundle,
    look_at_certificate,
    look_at_clock,
    look_at_secrecy,
    tell,
)

TIMEOUT_S = 5.0
EXAMPLES = """\b
Examples:
  edge-agent doctor --cloud cloud:50051 --tls-ca ca.pem
  edge-agent doctor --config edge.toml --json"""


@click.command(cls=Command, epilog=EXAMPLES)
@click.option("--json", "as_json", is_flag=True, help="Print what was found as JSON.")
@settings("Cloud and device", "Photos", "Server")
def doctor(as_json: bool) -> None:
    """Check settings, clock, bundle, certificates, proxies and every cloud, and say what to fix.

    Ends with 1 where something is wrong. Takes the options of `run`, which it does not start.
    """
    tell(findings(read(EdgeConfig), read(HttpConfig)), as_json)


def findings(config: EdgeConfig, http: HttpConfig) -> Iterator[Finding]:
    yield Finding("settings", "ok", "valid")
    yield look_at_clock()
    yield look_at_bundle(config.bundle, Manifest)
    if config.require_signature is not None:
        yield look_at_signature(config.bundle, config.require_signature)
    yield from look_at_tls(config.tls)
    if http.api_token_file is not None:
        yield look_at_secrecy(http.api_token_file)
    name = proxy_variable()
    if name is not None and config.clouds:
        fix = "add the cloud's host to no_proxy, unless it is reached through that proxy"
        yield Finding("proxy", "warning", f"{name} is set, so gRPC connects through it", fix)
    if not config.clouds:
        yield Finding("cloud", "warning", "none is given: the device answers alone", "give --cloud HOST:PORT")
    for target in config.clouds:
        yield look_at_cloud(target, config)


def look_at_signature(folder: Path, key: str) -> Finding:
    from isthmus.models.bundle.signature import read_public_key, signed_fingerprint

    def check() -> str:
        return f"of {signed_fingerprint(folder, read_public_key(key))[:12]}, by the key that is asked for"

    return attempt("signature", check, "sign it: minisign -Sm manifest.json")


def look_at_tls(tls: Tls | None) -> Iterator[Finding]:
    if tls is None or not tls.on:
        yield Finding("tls", "warning", "off: photos cross in plain text", "give --tls-ca, or --tls for a public name")
        return
    for path in (tls.ca, tls.certificate):
        if path is not None:
            yield look_at_certificate(path)
    for path in (tls.key, tls.token_file):
        if path is not None:
            yield look_at_secrecy(path)


def look_at_cloud(target: str, config: EdgeConfig) -> Finding:
    """Whether the cloud answers, and holds the bundle."""
    from isthmus.edge_agent.transport.ask import ask_cloud

    what = f"cloud {target}"
    try:
        info = ask_cloud(target, config.tls, TIMEOUT_S)
    except IsthmusError as error:
        return Finding(
            what, "wrong", str(error), "do what it says; else start the service, or open its port on the way"
        )
    held = [bundle.name for bundle in info.bundles]
    text = f"version {info.version}, holds {', '.join(held) or 'no bundle'}"
    try:
        own = read_manifest(config.bundle, Manifest).fingerprint
    except IsthmusError:
        return Finding(what, "ok", text)
    if own not in {bundle.fingerprint.hex() for bundle in info.bundles}:
        return Finding(what, "wrong", f"{text}; not this device's bundle {own[:12]}", "give both sides the same bundle")
    return Finding(what, "ok", text)
