"""`edge-agent run`: the local HTTP API, for photos, prompts, or both."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import click

from isthmus.edge_agent.cli.photos import open_photos_with_metrics
from isthmus.edge_agent.cli.prompts import open_prompts, open_routes
from isthmus.edge_agent.cli.settings import settings
from isthmus.edge_agent.config import HttpConfig, LanguageConfig
from isthmus.models.fail import needing
from isthmus.models.options import DEFAULT, Command, given, read

MAX_PORT = 65_535
EXAMPLES = """\b
Examples:
  edge-agent run --cloud cloud:50051
  edge-agent run --model smollm2 --cloud cloud:50051 --listen 0.0.0.0:8080
  edge-agent run --config edge.toml"""


@click.command(cls=Command, epilog=EXAMPLES)
@click.option("--json", "as_json", is_flag=True, help="Print the start-up line as JSON.")
@settings("Server", "Cloud and device", "Photos", "Language model")
def run(as_json: bool) -> None:
    """Serve the local HTTP API.

    \b
    /v1/infer                                  photos
    /v1/chat/completions, /v1/completions,     prompts, as OpenAI's API
    /v1/models
    /healthz, /metrics                         for whoever watches it

    With --model and no --bundle there are no photos; without --model there are no prompts.
    """
    from prometheus_client import CollectorRegistry
    from prometheus_client.process_collector import ProcessCollector

    with needing("edge"):  # the web server, which other commands do without
        import uvicorn

        from isthmus.edge_agent.http.app import create_app

    host, port = address(read(HttpConfig).listen)
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    line: dict[str, Any] = {"listen": f"{host}:{port}"}
    with ExitStack() as stack:
        photos, prompts = None, list[Any]()
        with_prompts = given()["model"].value is not None
        if not with_prompts or given()["bundle"].source != DEFAULT:
            photos = open_photos_with_metrics(registry)
            agent = stack.enter_context(photos[0])
            line |= {"bundle": agent.manifest.name, "cloud": describe([agent.link] if agent.link else [])}
        if with_prompts:
            language = stack.enter_context(open_prompts(read(LanguageConfig), registry))
            prompts = open_routes(language)
            line |= {"model": language.name, "cloud": describe(list(language.replicas))}
        names = " and ".join(line[key] for key in ("bundle", "model") if key in line)
        click.echo(json.dumps(line) if as_json else f"{names} on http://{line['listen']}, {line['cloud']}")
        app = create_app(registry, photos, prompts)
        uvicorn.run(app, host=host, port=port, log_level="warning", timeout_keep_alive=30)


def address(listen: str) -> tuple[str, int]:
    """Raises click.UsageError unless it is HOST:PORT."""
    host, _, port = listen.rpartition(":")
    if not host or not port.isdecimal() or int(port) > MAX_PORT:
        raise click.UsageError(f"--listen {listen!r} is not HOST:PORT")
    return host, int(port)


def describe(links: Sequence[Any]) -> str:
    """Clouds and their state, for the start-up line."""
    return ", ".join(f"cloud {link.target} {link.state}" for link in links) or "no cloud"
