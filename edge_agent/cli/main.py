"""Command line and environment of the agent, read once."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_args

import click

from isthmus.edge_agent.config import MODES, EdgeConfig, LanguageConfig, Tls, WholeImage
from isthmus.edge_agent.policy.arms import ARMS
from isthmus.edge_agent.policy.prices import Objective, Prices
from isthmus.edge_agent.vision.agent import EdgeAgent
from isthmus.edge_agent.vision.result import format_answer
from isthmus.models.errors import InvalidInput, IsthmusError
from isthmus.models.messages import Sampling
from isthmus.models.vision.manifest import Precision

FILE = click.Path(path_type=Path, exists=True, dir_okay=False)
Command = TypeVar("Command", bound=Callable[..., Any])
PROGRESS_FROM = 10  # photos; fewer are done before a bar could be read


def option(flag: str, *names: str, **settings: Any) -> Callable[[Command], Command]:
    """A click option that can also be set as ISTHMUS_EDGE_<NAME>; a repeatable one with spaces between its values."""
    name = flag.removeprefix("--").replace("-", "_").upper()
    return click.option(flag, *names, envvar=f"ISTHMUS_EDGE_{name}", show_envvar=True, show_default=True, **settings)


DEFAULT_BUNDLE = Path("models/zoo/elpv")
CLOUD = [
    option("--cloud", metavar="HOST:PORT", help="The cloud service; without it the device answers alone."),
    option("--tls-ca", type=FILE, help="PEM; turns TLS on."),
    option("--tls-certificate", type=FILE, help="PEM of this device, for mutual TLS."),
    option("--tls-key", type=FILE),
    option("--threads", type=click.IntRange(0, 256), default=0, help="ONNX Runtime threads; 0 for every core."),
    option("--objective", type=click.Choice(get_args(Objective)), default="fastest", help="Of what is good enough."),
    option("--usd-per-gb", type=click.FloatRange(0), default=0.50, help="Price of the uplink."),
    option("--usd-per-cloud-hour", type=click.FloatRange(0), default=0.05),
]
PHOTOS = [
    option("--bundle", type=click.Path(path_type=Path), help=f"Of a vision model.  [default: {DEFAULT_BUNDLE}]"),
    option("--mode", type=click.Choice(MODES), default="auto", help="auto lets the router choose; others pin one arm."),
    option("--precision", type=click.Choice(get_args(Precision)), default="fp32", help="Of the head."),
    option("--epsilon", type=click.FloatRange(0, 1), default=0.005, help="Certified loss of accuracy at the exits."),
    option("--min-agreement", type=click.FloatRange(0, 1), default=0.96, help="Of a rate with the cloud model."),
    option("--task", "tasks", multiple=True, help="A question of the bundle, repeatable.  [default: its first]"),
    option("--deadline-ms", type=click.FloatRange(1, 600_000), default=1000.0),
    option("--image-format", type=click.Choice(["jpeg", "png", "webp"]), default="jpeg", help="Of a photo sent whole."),
    option("--image-quality", type=click.IntRange(1, 100), default=75),
]
MODEL_HELP = "A language model: GGUF file, Hugging Face folder, or smollm2. --cloud may then name several, by commas."
LANGUAGE = [
    option("--device-model", help="A smaller model with the same tokenizer, for the device."),
    option("--device-bits", type=click.Choice(["4", "8"]), default="8", help="Of the device's weights."),
    option("--draft", type=click.Choice(["model", "lookup"]), default="model", help="Where drafts come from."),
    option(
        "--handoff",
        type=click.Path(path_type=Path),
        help="A bundle of exits and judges: for handoff and auto.",
    ),
    option("--quality", type=click.FloatRange(0, 1), default=0.99, help="Of auto: its tokens as the cloud has them."),
    option("--agreement", type=click.FloatRange(0, 1), default=0.97, help="With the full model, where exits decide."),
    option("--state-point", type=click.IntRange(0), help="How rows are coded.  [default: the cheapest good one]"),
    option("--fill", is_flag=True, help="The cloud guesses state of tokens that exits decided: cheaper, less exact."),
    option("--prefill-layers", type=click.IntRange(0, 512), default=0, help="Of the cloud, for prompts; 0: all."),
    option("--context", type=click.IntRange(16), default=2048, help="Tokens that the device's model holds."),
    option("--on-loss", type=click.Choice(["alone", "wait"]), default="alone", help="No cloud left in mid-answer."),
]


def settings(*groups: list[Callable[[Any], Any]]) -> Callable[[Command], Command]:
    """Options that several commands share."""

    def decorate(command: Command) -> Command:
        for group in reversed(groups):
            for add in reversed(group):
                command = add(command)
        return command

    return decorate


def to_config(
    bundle: Path | None,
    cloud: str | None,
    mode: str,
    precision: str,
    objective: str,
    epsilon: float,
    min_agreement: float,
    tasks: tuple[str, ...],
    deadline_ms: float,
    threads: int,
    image_format: str,
    image_quality: int,
    usd_per_gb: float,
    usd_per_cloud_hour: float,
    tls_ca: Path | None,
    tls_certificate: Path | None,
    tls_key: Path | None,
    **language: Any,
) -> EdgeConfig:
    """Checked options -> EdgeConfig; those of a language model are not for it."""
    return EdgeConfig(
        bundle=bundle or DEFAULT_BUNDLE,
        cloud=cloud.split(",")[0] if cloud else None,
        mode=mode,  # type: ignore[arg-type]
        precision=precision,  # type: ignore[arg-type]
        objective=objective,  # type: ignore[arg-type]
        epsilon=epsilon,
        min_agreement=min_agreement,
        tasks=tasks,
        deadline_s=deadline_ms / 1000,
        threads=threads,
        prices=Prices(usd_per_gb / 1e9, usd_per_cloud_hour / 3600),
        whole_image=WholeImage(image_format, image_quality),  # type: ignore[arg-type]
        tls=Tls(tls_ca, tls_certificate, tls_key) if tls_ca else None,
    )


def to_language_config(
    model: str,
    cloud: str | None,
    device_model: str | None,
    device_bits: str,
    draft: str,
    handoff: Path | None,
    agreement: float,
    state_point: int | None,
    fill: bool,
    prefill_layers: int,
    quality: float,
    objective: str,
    context: int,
    on_loss: str,
    threads: int,
    usd_per_gb: float,
    usd_per_cloud_hour: float,
    tls_ca: Path | None,
    tls_certificate: Path | None,
    tls_key: Path | None,
    **photos: Any,
) -> LanguageConfig:
    """Checked options -> LanguageConfig; those of a vision model are not for it."""
    return LanguageConfig(
        model=model,
        clouds=tuple(target.strip() for target in cloud.split(",") if target.strip()) if cloud else (),
        device_model=device_model,
        device_bits=int(device_bits),  # type: ignore[arg-type]
        draft=draft,  # type: ignore[arg-type]
        handoff=handoff,
        agreement=agreement,
        state_point=state_point,
        fill=fill,
        prefill_layers=prefill_layers,
        quality=quality,
        objective=objective,  # type: ignore[arg-type]
        prices=Prices(usd_per_gb / 1e9, usd_per_cloud_hour / 3600),
        context=context,
        on_loss=on_loss,  # type: ignore[arg-type]
        threads=threads,
        tls=Tls(tls_ca, tls_certificate, tls_key) if tls_ca else None,
    )


@click.group(epilog="Example: edge-agent infer photo.jpg --cloud cloud:50051")
def main() -> None:
    """Answer photos and prompts on this device, with the help of the cloud where it pays."""


INFER_EXAMPLE = "edge-agent infer photo.jpg --cloud cloud:50051 --tap light --width 0.5 --rate 2 --json"


@main.command(epilog=f"Example: {INFER_EXAMPLE}")
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
@click.option("--tap", help="The bottleneck to send, by name; what is not named of these three the router chooses.")
@click.option("--width", type=click.FloatRange(0, 1), help="The share of its encoder's channels.")
@click.option("--rate", type=click.IntRange(0), help="Its rate; 0 is the cheapest.")
@settings(PHOTOS, CLOUD)
def infer(
    files: tuple[Path, ...], as_json: bool, tap: str | None, width: float | None, rate: int | None, **options: Any
) -> None:
    """Answer each of FILES (JPEG, PNG or WebP)."""
    with opened(to_config(**options)) as agent:
        failed = 0
        for file in progress(files):
            try:
                answer = agent.infer(file, tap=tap, width=width, rate=rate)
            except IsthmusError as error:
                failed += 1
                click.echo(f"error: {file}: {error}", err=True)
                continue
            row = {"file": str(file), **answer.as_dict()}
            click.echo(json.dumps(row) if as_json else "\n".join(format_answer(str(file), answer)))
    sys.exit(1 if failed else 0)


@main.command(epilog="Example: edge-agent run --model smollm2 --cloud cloud:50051 --listen 127.0.0.1:8080")
@option("--listen", default="127.0.0.1:8080", help="HTTP address.")
@option("--model", help=MODEL_HELP)
@click.option("--json", "as_json", is_flag=True, help="Print the start-up line as JSON.")
@settings(PHOTOS, LANGUAGE, CLOUD)
def run(listen: str, model: str | None, as_json: bool, **options: Any) -> None:
    """Serve the local HTTP API: photos (/v1/infer), prompts as OpenAI does (/v1/chat/completions, /v1/completions,
    /v1/models), /healthz, /metrics.

    With --model alone there are no photos, without it no prompts.
    """
    import uvicorn  # the web server is not needed by `infer`
    from prometheus_client import CollectorRegistry
    from prometheus_client.process_collector import ProcessCollector

    from isthmus.edge_agent.http.app import create_app

    host, _, port = listen.rpartition(":")
    if not host or not port.isdigit() or int(port) > 65535:
        raise click.UsageError(f"--listen {listen!r} is not HOST:PORT")
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    line: dict[str, Any] = {"listen": listen}
    with ExitStack() as stack:
        photos, prompts = None, list[Any]()
        if model is None or options["bundle"] is not None:
            photos = open_photos(to_config(**options), registry)
            agent = stack.enter_context(photos[0])
            line |= {"bundle": agent.manifest.name, "cloud": clouds([agent.link] if agent.link else [])}
        if model is not None:
            language, prompts = open_language(to_language_config(model, **options), registry)
            stack.enter_context(language)
            line |= {"model": language.name, "cloud": clouds(list(language.replicas))}
        names = " and ".join(line[key] for key in ("bundle", "model") if key in line)
        click.echo(json.dumps(line) if as_json else f"{names} on http://{listen}, {line['cloud']}")
        app = create_app(registry, photos, prompts)
        uvicorn.run(app, host=host, port=int(port), log_level="warning", timeout_keep_alive=30)


@main.command(epilog="Example: edge-agent chat --model smollm2 --handoff models/zoo/smollm2 --cloud cloud:50051")
@option("--model", default="smollm2", help=MODEL_HELP)
@option("--arm", type=click.Choice(ARMS), default="auto", help="auto: as the router has it, token by token.")
@option("--system", default="", help="What the model is told first.")
@option("--max-tokens", type=click.IntRange(1), help="Of an answer.  [default: what the context leaves]")
@option("--temperature", type=click.FloatRange(0, 2), default=0.0, help="0 is greedy.")
@option("--seed", type=click.IntRange(0), default=0)
@click.option("--json", "as_json", is_flag=True, help="One JSON object an answer; questions are lines of the input.")
@settings(LANGUAGE, CLOUD)
def chat(
    model: str,
    arm: str,
    system: str,
    max_tokens: int | None,
    temperature: float,
    seed: int,
    as_json: bool,
    **options: Any,
) -> None:
    """Talk to a language model; each token has the colour of where it was made."""
    from rich.console import Console

    from isthmus.edge_agent.cli.chat import ChatSettings
    from isthmus.edge_agent.cli.chat import chat as talk

    config = to_language_config(model, **options)
    if arm not in ("auto", "edge") and not config.clouds:
        raise click.UsageError(f"--arm {arm} needs --cloud")
    with open_language(config)[0] as agent:
        chat_settings = ChatSettings(system, max_tokens, Sampling(temperature, seed=seed), config.prices, as_json)
        source = None if sys.stdin.isatty() else sys.stdin
        failed = talk(agent, arm, Console(highlight=False), chat_settings, source)  # type: ignore[arg-type]
    sys.exit(1 if failed else 0)


def open_photos(config: EdgeConfig, registry: Any) -> tuple[EdgeAgent, Any]:
    """An agent for photos and its metrics, or the end of the program with one line."""
    from isthmus.edge_agent.vision.metrics import EdgeMetrics
    from isthmus.models.bundle.files import read_manifest
    from isthmus.models.vision.manifest import Manifest

    try:
        metrics = EdgeMetrics(registry, read_manifest(config.bundle, Manifest))
    except IsthmusError as error:
        fail(error)
    return opened(config, metrics), metrics


def open_language(config: LanguageConfig, registry: Any = None) -> tuple[Any, list[Any]]:
    """An agent for prompts and its HTTP routes, or the end of the program with one line."""
    try:
        from isthmus.edge_agent.http.openai.routes import routes
        from isthmus.edge_agent.language.agent import LanguageAgent
        from isthmus.edge_agent.language.metrics import LanguageMetrics
    except ImportError as error:
        fail(InvalidInput(f"{error.name} is missing: a language model needs pip install 'isthmus[edge,llm]'"))
    try:
        agent = LanguageAgent(config, LanguageMetrics(registry) if registry is not None else None)
    except (IsthmusError, OSError) as error:
        fail(error)
    return agent, routes(agent)


def clouds(links: Sequence[Any]) -> str:
    """Clouds and their state, for the start-up line."""
    return ", ".join(f"cloud {link.target} {link.state}" for link in links) or "no cloud"


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
