"""Command line and environment of the agent, read once."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import click

from edge_agent.answer import Answer
from edge_agent.config import MODES, EdgeConfig, Tls, WholeImage
from edge_agent.policy.plan import Prices
from edge_agent.vision import EdgeAgent
from models.errors import IsthmusError

FILE = click.Path(path_type=Path, exists=True, dir_okay=False)
Command = TypeVar("Command", bound=Callable[..., Any])
PROGRESS_FROM = 10  # photos; fewer are done before a bar could be read


def option(flag: str, **settings: Any) -> Callable[[Command], Command]:
    """A click option that can also be set as ISTHMUS_EDGE_<NAME>."""
    name = flag.removeprefix("--").replace("-", "_").upper()
    return click.option(flag, envvar=f"ISTHMUS_EDGE_{name}", show_envvar=True, show_default=True, **settings)


SETTINGS = [
    option("--bundle", type=click.Path(path_type=Path), default=Path("models/zoo/elpv")),
    option("--cloud", metavar="HOST:PORT", help="The cloud service; without it the device answers alone."),
    option("--mode", type=click.Choice(MODES), default="auto", help="auto lets the router choose; others pin one arm."),
    option("--objective", type=click.Choice(["fastest", "cheapest"]), default="fastest"),
    option("--epsilon", type=click.FloatRange(0, 1), default=0.005, help="Certified loss of accuracy at the exits."),
    option("--min-agreement", type=click.FloatRange(0, 1), default=0.96, help="Of a rate with the cloud model."),
    option("--deadline-ms", type=click.FloatRange(1, 600_000), default=1000.0),
    option("--threads", type=click.IntRange(0, 256), default=0, help="ONNX Runtime threads; 0 for every core."),
    option("--image-format", type=click.Choice(["jpeg", "png", "webp"]), default="jpeg", help="Of a photo sent whole."),
    option("--image-quality", type=click.IntRange(1, 100), default=75),
    option("--usd-per-gb", type=click.FloatRange(0), default=0.50, help="Price of the uplink."),
    option("--usd-per-cloud-hour", type=click.FloatRange(0), default=0.05),
    option("--tls-ca", type=FILE, help="PEM; turns TLS on."),
    option("--tls-certificate", type=FILE, help="PEM of this device, for mutual TLS."),
    option("--tls-key", type=FILE),
]


def settings(command: Command) -> Command:
    """The options that `infer` and `run` share."""
    for decorate in reversed(SETTINGS):
        command = decorate(command)
    return command


def to_config(
    bundle: Path,
    cloud: str | None,
    mode: str,
    objective: str,
    epsilon: float,
    min_agreement: float,
    deadline_ms: float,
    threads: int,
    image_format: str,
    image_quality: int,
    usd_per_gb: float,
    usd_per_cloud_hour: float,
    tls_ca: Path | None,
    tls_certificate: Path | None,
    tls_key: Path | None,
) -> EdgeConfig:
    """Checked options -> EdgeConfig."""
    return EdgeConfig(
        bundle=bundle,
        cloud=cloud or None,
        mode=mode,  # type: ignore[arg-type]
        objective=objective,  # type: ignore[arg-type]
        epsilon=epsilon,
        min_agreement=min_agreement,
        deadline_s=deadline_ms / 1000,
        threads=threads,
        prices=Prices(usd_per_gb / 1e9, usd_per_cloud_hour / 3600),
        whole_image=WholeImage(image_format, image_quality),  # type: ignore[arg-type]
        tls=Tls(tls_ca, tls_certificate, tls_key) if tls_ca else None,
    )


@click.group(epilog="Example: edge-agent infer photo.jpg --cloud cloud:50051")
def main() -> None:
    """Answer photos on this device, with the help of the cloud where it pays."""


@main.command(epilog="Example: edge-agent infer photo.jpg --cloud cloud:50051 --json")
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
@settings
def infer(files: tuple[Path, ...], as_json: bool, **options: Any) -> None:
    """Answer each of FILES (JPEG, PNG or WebP)."""
    with opened(to_config(**options)) as agent:
        failed = 0
        for file in progress(files):
            try:
                answer = agent.infer(file)
            except IsthmusError as error:
                failed += 1
                click.echo(f"error: {file}: {error}", err=True)
                continue
            row = {"file": str(file), **answer.as_dict()}
            click.echo(json.dumps(row) if as_json else "\n".join(page(file, answer)))
    sys.exit(1 if failed else 0)


@main.command(epilog="Example: edge-agent run --cloud cloud:50051 --listen 127.0.0.1:8080")
@option("--listen", default="127.0.0.1:8080", help="HTTP address.")
@click.option("--json", "as_json", is_flag=True, help="Print the start-up line as JSON.")
@settings
def run(listen: str, as_json: bool, **options: Any) -> None:
    """Serve the local HTTP API: POST /v1/infer, GET /v1/status, /healthz, /metrics."""
    import uvicorn  # the web server is not needed by `infer`
    from prometheus_client import CollectorRegistry
    from prometheus_client.process_collector import ProcessCollector

    from edge_agent.api import create_app
    from edge_agent.metrics import EdgeMetrics
    from models.bundle import read_manifest

    host, _, port = listen.rpartition(":")
    if not host or not port.isdigit() or int(port) > 65535:
        raise click.UsageError(f"--listen {listen!r} is not HOST:PORT")
    config = to_config(**options)
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    try:
        metrics = EdgeMetrics(registry, read_manifest(config.bundle))
    except IsthmusError as error:
        fail(error)
    with opened(config, metrics) as agent:
        cloud = f"cloud {config.cloud} {agent.link.state}" if agent.link else "no cloud"
        line = {"listen": listen, "bundle": agent.manifest.name, "cloud": cloud}
        click.echo(json.dumps(line) if as_json else f"{agent.manifest.name} on http://{listen}, {cloud}")
        uvicorn.run(
            create_app(agent, metrics, registry), host=host, port=int(port), log_level="warning", timeout_keep_alive=30
        )


def opened(config: EdgeConfig, metrics: Any = None) -> EdgeAgent:
    """An agent, or the end of the program with one line."""
    try:
        return EdgeAgent(config, metrics)
    except (IsthmusError, OSError) as error:
        fail(error)


def fail(error: Exception) -> NoReturn:
    click.echo(f"error: {error}", err=True)
    sys.exit(1)


def progress(files: Sequence[Path]) -> Any:
    """A bar on a terminal's standard error when there are many photos."""
    if len(files) < PROGRESS_FROM or not sys.stderr.isatty():
        return files
    from rich.console import Console
    from rich.progress import track

    return track(files, "photos", console=Console(stderr=True))


def page(file: Path, answer: Answer) -> list[str]:
    """An answer for a person."""
    where = {
        "exit": f"on the device at {answer.exit}",
        "split": f"by the cloud from {answer.bytes_up} B at rate {answer.rate}",
        "offload": f"by the cloud from the whole image, {answer.bytes_up} B",
        "fallback": f"on the device at {answer.exit}, DEGRADED",
    }[answer.route]
    stages = ", ".join(f"{name} {value:.1f}" for name, value in answer.stage_ms.items() if name != "total")
    return [
        f"{file}: {answer.label} ({max(answer.probabilities):.1%}), {where}, {answer.stage_ms['total']:.1f} ms",
        f"    why: {answer.why}",
        f"    ms: {stages}",
    ]


if __name__ == "__main__":
    main()
