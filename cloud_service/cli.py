"""The program `cloud-service`. Its settings are read once, as `models.options` says."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys

import click

from isthmus.cloud_service.config import PREFIX, CloudConfig
from isthmus.models.bundle.installed import missing
from isthmus.models.errors import IsthmusError
from isthmus.models.fail import fail, needing
from isthmus.models.options import WIDE, Command, describe, known_settings, options, read

SECTIONS = {"Settings": CloudConfig}
EXAMPLES = """\b
Examples:
  cloud-service --bundle photos
  cloud-service --bundle photos --bundle elpv --listen 0.0.0.0:50051 --metrics 0.0.0.0:9101
  cloud-service --model smollm2 --handoff smollm2
  cloud-service --check 127.0.0.1:50051"""


@click.command(cls=Command, epilog=EXAMPLES, context_settings=WIDE)
@click.option("--check", metavar="HOST:PORT", help="Ask a running service for its health and exit.")
@click.option("--show-config", is_flag=True, help="Print each setting, its value and where that comes from, and exit.")
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    envvar=f"{PREFIX}_JSON",
    help="Log as JSON lines; --check and --show-config print JSON.",
)
@click.version_option(package_name="isthmus", prog_name="cloud-service")
@options(PREFIX, known_settings(CloudConfig), SECTIONS)
def main(check: str | None, show_config: bool, as_json: bool) -> None:
    """The cloud half of Isthmus: serves bundles for photos, and language models, to devices."""
    if check:
        sys.exit(print_health(check, as_json))
    config = read(CloudConfig)
    if show_config:
        click.echo(describe(as_json))
        return
    if not config.bundles and not config.models:
        raise click.UsageError("give at least one --bundle or --model")
    for bundle in (*config.bundles, *config.handoffs):
        if problem := missing(bundle):
            fail(problem)
    start_logging(as_json)
    # OpenMP threads that spin while they wait make a pass twenty times slower as soon as one core is taken.
    os.environ.setdefault("GOMP_SPINCOUNT", "0")
    # Or products' bits depend on where in memory their rows are, which differs between threads.
    os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
    with needing("cloud"):
        from isthmus.cloud_service.app import serve  # PyTorch takes seconds to import, and --check runs often

    try:
        asyncio.run(serve(config))
    except IsthmusError as error:
        fail(error)


def print_health(address: str, as_json: bool) -> int:
    """0 when the service at `address` says SERVING, else 1."""
    with needing("cloud"):
        import grpc
        from grpc_health.v1 import health_pb2, health_pb2_grpc

    with grpc.insecure_channel(address) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=3)
            state = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
        except grpc.RpcError as error:
            state = error.code().name
    click.echo(json.dumps({"address": address, "health": state}) if as_json else state)
    return 0 if state == "SERVING" else 1


class JsonLines(logging.Formatter):
    """One JSON object a record."""

    def format(self, record: logging.LogRecord) -> str:
        line = {"time": self.formatTime(record), "level": record.levelname, "message": record.getMessage()}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


def start_logging(as_json: bool) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines() if as_json else logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
