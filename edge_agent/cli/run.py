"""`edge-agent run`: the local HTTP API, for photos, prompts, or both."""

from __future__ import annotations

import json
from contextlib import ExitStack
from functools import partial
from typing import Any

import click

from isthmus.edge_agent.cli.clouds import describe_clouds, warn_of
from isthmus.edge_agent.cli.photos import open_photos_with_metrics
from isthmus.edge_agent.cli.prompts import open_prompts, open_routes, warn
from isthmus.edge_agent.cli.settings import settings
from isthmus.edge_agent.config import HttpConfig, LanguageConfig
from isthmus.models.address import Address
from isthmus.models.fail import needing
from isthmus.models.options import DEFAULT, Command, given, read

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

    With --model or --cloud-model, and no --bundle, there are no photos; without both there are no prompts.
    """
    from prometheus_client import CollectorRegistry
    from prometheus_client.process_collector import ProcessCollector

    with needing("edge"):  # the web server, which other commands do without
        from isthmus.edge_agent.cli.serve import serve
        from isthmus.edge_agent.http.app import create_app

    http = read(HttpConfig)
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    line: dict[str, Any] = {"listen": http.listen}
    with ExitStack() as stack:
        photos, prompts, language = None, list[Any](), None
        named = any(given()[key].value is not None for key in ("model", "cloud_model"))
        config = read(LanguageConfig) if named else None
        if config is None or given()["bundle"].source != DEFAULT:
            photos = open_photos_with_metrics(registry)
            agent = stack.enter_context(photos[0])
            warn_of(agent.replicas)
            line |= {"bundle": agent.manifest.name, "cloud": describe_clouds(agent.replicas)}
        if config is not None:
            language = stack.enter_context(open_prompts(config, registry))
            prompts = open_routes(language, http)
            warn(language)
            if language.ready and not language.tokenizer.has_template:
                click.echo(
                    f"warning: {language.name} has no chat template: /v1/chat/completions is refused, "
                    "/v1/completions continues a text",
                    err=True,
                )
            line |= {"model": language.name, "cloud": describe_clouds(language.replicas)}
            if language.cloud_name not in (None, language.name):
                line["cloud_model"] = language.cloud_name
        app = create_app(registry, photos, prompts, http, language.status if language else None)
        serve(app, http, partial(announce, line, as_json))


def announce(line: dict[str, Any], as_json: bool, bound: Address) -> None:
    """The start-up line, printed when the port is open."""
    names = " and ".join(line[key] for key in ("bundle", "model", "cloud_model") if key in line)
    line = {**line, "listen": str(bound)}
    click.echo(json.dumps(line) if as_json else f"{names} on http://{bound}, {line['cloud']}")
