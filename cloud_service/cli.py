"""The program `cloud-service`. Its settings are read once, as `models.options` says."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from isthmus.cloud_service.config import PREFIX, CloudConfig, RayConfig
from isthmus.cloud_service.keys.command import keys
from isthmus.models.address import parse_address
from isthmus.models.bundle.installed import missing
from isthmus.models.errors import InvalidInput, IsthmusError
from isthmus.models.fail import fail, needing
from isthmus.models.messages import describe_model
from isthmus.models.options import WIDE, Command, describe, known_settings, options, read

PEM = click.Path(path_type=Path, exists=True, dir_okay=False)
SECTIONS = {"Settings": CloudConfig}
KNOWN = known_settings(RayConfig, CloudConfig)
EXAMPLES = """\b
Examples:
  cloud-service --bundle photos
  cloud-service --bundle photos --bundle elpv --listen 0.0.0.0:50051 --tls-certificate keys/service.pem \
      --tls-key keys/service.key --tls-client-ca keys/ca.pem --access keys/access.json
  cloud-service --model smollm2 --handoff smollm2
  cloud-service --engine-url http://127.0.0.1:8000 --engine-tokenizer models/Qwen3-8B
  cloud-service --check 127.0.0.1:50051
  cloud-service ray --bundle photos --replicas 2"""
RAY_EXAMPLES = """\b
Examples:
  cloud-service ray --bundle photos --replicas 2
  cloud-service ray --bundle photos --replicas 2 --max-replicas 8 --address head:6379"""
# Read when Ray is imported. No statistics are sent; requests go to replicas by gRPC, at a tenth less work for a photo.
RAY_ENVIRONMENT = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1"}
# Of a cluster that `ray_serve` starts: every call needs a token, and ports are on loopback, which Ray does by itself on
# Windows and macOS only. Its controller looks at the replicas every so many seconds, by default five times as often.
LOCAL_RAY_ENVIRONMENT = {
    "RAY_AUTH_MODE": "token",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",
}


class Service(Command, click.Group):
    """A command that does without a subcommand, and has some."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        super().format_options(ctx, formatter)
        self.format_commands(ctx, formatter)


@click.group(cls=Service, invoke_without_command=True, epilog=EXAMPLES, context_settings=WIDE)
@click.option("--check", metavar="HOST:PORT", help="Ask a running service for its health and exit.")
@click.option(
    "--check-ca", envvar=f"{PREFIX}_CHECK_CA", type=PEM, help="PEM file of the authority, for --check with TLS."
)
@click.option(
    "--check-certificate", envvar=f"{PREFIX}_CHECK_CERTIFICATE", type=PEM, help="With --check-key: for mutual TLS."
)
@click.option("--check-key", envvar=f"{PREFIX}_CHECK_KEY", type=PEM, help="Key of --check-certificate.")
@click.option(
    "--check-name", envvar=f"{PREFIX}_CHECK_NAME", help="Name in the service's certificate, where it is not HOST."
)
@click.option("--show-config", is_flag=True, help="Print each setting, its value and where that comes from, and exit.")
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    envvar=f"{PREFIX}_JSON",
    help="Log as JSON lines; --check and --show-config print JSON.",
)
@click.version_option(package_name="isthmus", prog_name="cloud-service")
@options(PREFIX, KNOWN, SECTIONS)
@click.pass_context
def main(context: click.Context, /, check: str | None, show_config: bool, as_json: bool, **check_tls: Any) -> None:
    """The cloud half of Isthmus: serves bundles for photos, and language models, to devices."""
    if context.invoked_subcommand:
        refuse_options(context, context.invoked_subcommand)
        return
    if check:
        sys.exit(check_health(check, as_json, **check_tls))
    config = read(CloudConfig)
    if show_config:
        click.echo(describe(as_json))
        return
    if not config.bundles and not config.models and config.engine is None:
        raise click.UsageError("give at least one --bundle, --model or --engine-url")
    prepare(config, as_json)
    with needing("cloud"):
        from isthmus.cloud_service.app import serve  # PyTorch takes seconds to import, and --check runs often

    try:
        asyncio.run(serve(config))
    except IsthmusError as error:
        fail(error)


@main.command(cls=Command, epilog=RAY_EXAMPLES, context_settings=WIDE)
@click.option("--show-config", is_flag=True, help="Print each setting, its value and where that comes from, and exit.")
@click.option(
    "--json", "as_json", is_flag=True, envvar=f"{PREFIX}_JSON", help="Log as JSON lines; --show-config prints JSON."
)
@options(PREFIX, KNOWN, {"Replicas": RayConfig, **SECTIONS})
def ray(show_config: bool, as_json: bool) -> None:
    """The same service, whose photos are computed by replicas on a Ray cluster: of this machine, or of many."""
    config, replicas = read(CloudConfig), read(RayConfig)
    if show_config:
        click.echo(describe(as_json))
        return
    if not config.bundles:
        raise click.UsageError("give at least one --bundle")
    prepare(config, as_json)
    os.environ.update(RAY_ENVIRONMENT | (LOCAL_RAY_ENVIRONMENT if replicas.address is None else {}))
    with needing("cloud,ray"):
        from isthmus.cloud_service.app import serve
        from isthmus.cloud_service.vision import ray_serve

    try:
        with ray_serve.cluster(replicas):
            asyncio.run(serve(config, partial(ray_serve.load, replicas=replicas)))
    except IsthmusError as error:
        fail(error)


@main.command(cls=Command, epilog="Example: cloud-service doctor --config cloud.toml", context_settings=WIDE)
@click.option("--json", "as_json", is_flag=True, help="Print what was found as JSON.")
@options(PREFIX, KNOWN, SECTIONS)
def doctor(as_json: bool) -> None:
    """Check settings, clock, bundles, certificates, devices and ports, and say what to fix.

    Ends with 1 where something is wrong. Takes the options of the service, which it does not start.
    """
    from isthmus.cloud_service.doctor import findings
    from isthmus.protos.diagnosis import tell

    tell(findings(read(CloudConfig)), as_json)


main.add_command(keys)


def refuse_options(context: click.Context, command: str) -> None:
    """Raises click.UsageError for an option before a command, which that would not see."""
    for param in context.command.params:
        if context.get_parameter_source(param.name or "") is ParameterSource.COMMANDLINE:
            raise click.UsageError(f"{param.opts[0]} comes after {command}")


def prepare(config: CloudConfig, as_json: bool) -> None:
    """What comes before PyTorch is imported. Ends the program when a bundle is missing."""
    for bundle in (*config.bundles, *config.handoffs):
        if problem := missing(bundle):
            fail(problem)
    start_logging(as_json)
    if config.tls and os.environ.get("GRPC_VERBOSITY") == "NONE":
        del os.environ["GRPC_VERBOSITY"]  # what it says of failed handshakes is counted and told in plain words
    # OpenMP threads that spin while they wait make a pass twenty times slower as soon as one core is taken.
    os.environ.setdefault("GOMP_SPINCOUNT", "0")
    # Or products' bits depend on where in memory their rows are, which differs between threads.
    os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
    # Or cuBLAS may share the memory of split sums between streams, and their order changes.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def check_health(
    check: str,
    as_json: bool,
    *,
    check_ca: Path | None,
    check_certificate: Path | None,
    check_key: Path | None,
    check_name: str | None,
) -> int:
    """Print the health of a service and of its engine: 0 when both are well, else 1. Raises click.UsageError."""
    try:
        address = str(parse_address(check))
    except InvalidInput as error:
        raise click.UsageError(f"--check {error}") from error
    if (check_certificate is None) != (check_key is None):
        raise click.UsageError("--check-certificate and --check-key need each other")
    if check_ca is None and (check_certificate or check_name):
        raise click.UsageError("--check-certificate and --check-name need --check-ca")
    pems = [None if path is None else path.read_bytes() for path in (check_ca, check_key, check_certificate)]
    state, engines, problems = health_of(address, pems if check_ca else None, check_name)
    found: dict[str, Any] = {"address": address, "health": state}
    found |= {key: value for key, value in (("engines", engines), ("problems", problems)) if value}
    click.echo(json.dumps(found) if as_json else "\n".join([state, *engines, *problems]))
    return 0 if state == "SERVING" and not problems else 1


def health_of(address: str, pems: Sequence[bytes | None] | None, name: str | None) -> tuple[str, list[str], list[str]]:
    """The health status of a service, or the name of gRPC's error; its engines' models; what cannot be used, and why.

    `pems`: authority, key and certificate, for TLS.
    """
    with needing("cloud"):
        import grpc
        from grpc_health.v1 import health_pb2, health_pb2_grpc

        from isthmus.protos.wire_describe import DESCRIBE, describe

    options: list[tuple[str, str | int]] = [
        ("grpc.enable_http_proxy", 0)
    ]  # a proxy does not reach an address of this machine
    if name:
        options.append(("grpc.ssl_target_name_override", name))
    if pems:
        channel = grpc.secure_channel(address, grpc.ssl_channel_credentials(*pems), options)
    else:
        channel = grpc.insecure_channel(address, options)
    with channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=3)
            info = describe(partial(channel.unary_unary(DESCRIBE), timeout=3))
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.UNAUTHENTICATED:  # it says what it holds to devices with a token only
                return str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)), [], []
            return str(error.code().name), [], []
        except IsthmusError as error:
            return str(error), [], []
    engines = [f"engine: {describe_model(model)}" for model in info.models if model.numerics == "engine"]
    state = str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))
    return state, engines, list(info.problems)


class JsonLines(logging.Formatter):
    """One JSON object a record."""

    def format(self, record: logging.LogRecord) -> str:
        line = {"time": self.formatTime(record), "level": record.levelname, "message": record.getMessage()}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


class FaultsOfPeers(logging.Filter):
    """Leaves out the tracebacks that gRPC logs when a peer leaves, or sends bytes that are no message."""

    def filter(self, record: logging.LogRecord) -> bool:
        kind = record.exc_info[0] if record.exc_info else None
        return kind is None or kind.__name__ not in ("ExecuteBatchError", "DecodeError")


def start_logging(as_json: bool) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines() if as_json else logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    logging.getLogger("grpc._cython.cygrpc").addFilter(FaultsOfPeers())
