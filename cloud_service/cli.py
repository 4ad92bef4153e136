"""Command line and environment of the cloud service, read once."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
from pathlib import Path

import click
import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from isthmus.cloud_service.config import CloudConfig, Tls
from isthmus.cloud_service.vision.batching import BatchLimits
from isthmus.models.errors import IsthmusError

FILE = click.Path(path_type=Path, exists=True, dir_okay=False)


@click.command(
    context_settings={"auto_envvar_prefix": "ISTHMUS_CLOUD", "show_default": True},
    epilog="Example: cloud-service --bundle models/zoo/elpv --listen 0.0.0.0:50051 --metrics 0.0.0.0:9101",
)
@click.option(
    "--bundle",
    "bundles",
    multiple=True,
    type=click.Path(path_type=Path),
    envvar="ISTHMUS_CLOUD_BUNDLE",
    help="A bundle to serve; repeatable, in the environment separated by colons.",
)
@click.option(
    "--model",
    "models",
    multiple=True,
    envvar="ISTHMUS_CLOUD_MODEL",
    help="A language model to serve: a GGUF file, a Hugging Face folder, or smollm2; repeatable.",
)
@click.option(
    "--handoff",
    "handoffs",
    multiple=True,
    type=click.Path(path_type=Path),
    envvar="ISTHMUS_CLOUD_HANDOFF",
    help="A hand-off bundle of one of the models, whose later layers then complete tokens; repeatable.",
)
@click.option("--dtype", default="bfloat16", type=click.Choice(["bfloat16", "float32"]), help="Of language models.")
@click.option("--width", default=16, type=click.IntRange(1, 256), help="Rows of a decoder's forward pass.")
@click.option("--context-mb", default=2048, type=click.IntRange(1), help="Memory of all sessions of a model.")
@click.option("--listen", default="127.0.0.1:50051", help="gRPC address; port 0 picks a free one.")
@click.option("--metrics", default="127.0.0.1:9101", help="Address of /metrics; empty for none.")
@click.option("--threads", default=0, help="Of a network; 0 for every core.")
@click.option("--max-batch", default=16, type=click.IntRange(1, 1024))
@click.option("--max-wait-ms", default=2.0, type=click.FloatRange(0, 1000), help="How long a batch may wait to fill.")
@click.option("--queue-limit", default=256, type=click.IntRange(1, 100_000), help="Inputs that may wait.")
@click.option("--drain-s", default=20.0, type=click.FloatRange(0, 600), help="Grace after SIGTERM.")
@click.option("--tls-certificate", type=FILE, help="PEM; TLS is on when given with --tls-key.")
@click.option("--tls-key", type=FILE)
@click.option("--tls-client-ca", type=FILE, help="PEM; devices must show a certificate signed by it.")
@click.option("--check", metavar="HOST:PORT", help="Ask a running service for its health and exit; nothing is served.")
@click.option("--json", "as_json", is_flag=True, help="Log as JSON lines; with --check, print JSON.")
def main(
    bundles: tuple[Path, ...],
    models: tuple[str, ...],
    handoffs: tuple[Path, ...],
    dtype: str,
    width: int,
    context_mb: int,
    listen: str,
    metrics: str,
    threads: int,
    max_batch: int,
    max_wait_ms: float,
    queue_limit: int,
    drain_s: float,
    tls_certificate: Path | None,
    tls_key: Path | None,
    tls_client_ca: Path | None,
    check: str | None,
    as_json: bool,
) -> None:
    """Serve the cloud half of bundles, and language models, to devices."""
    if check:
        sys.exit(print_health(check, as_json))
    if not bundles and not models:
        raise click.UsageError("give at least one --bundle or --model")
    if (tls_certificate is None) != (tls_key is None) or (tls_client_ca and not tls_key):
        raise click.UsageError("--tls-certificate and --tls-key go together, --tls-client-ca needs both")
    start_logging(as_json)
    config = CloudConfig(
        bundles=bundles,
        models=models,
        handoffs=handoffs,
        dtype=dtype,
        width=width,
        context_bytes=context_mb << 20,
        listen=listen,
        metrics=metrics or None,
        threads=threads,
        batch=BatchLimits(max_batch, max_wait_ms / 1000),
        queue_limit=queue_limit,
        drain_s=drain_s,
        tls=Tls(tls_certificate, tls_key, tls_client_ca) if tls_certificate and tls_key else None,
    )
    # OpenMP threads that spin while they wait make a pass twenty times slower as soon as one core is taken.
    os.environ.setdefault("GOMP_SPINCOUNT", "0")
    # Or products' bits depend on where in memory their rows are, which differs between threads.
    os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
    from isthmus.cloud_service.app import serve  # PyTorch takes seconds to import, and --check runs often

    try:
        asyncio.run(serve(config))
    except IsthmusError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(1)


def print_health(address: str, as_json: bool) -> int:
    """0 when the service at `address` says SERVING, else 1."""
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
