"""The picture of a chat in the documentation: a real cloud over an emulated link, and the terminal as SVG."""

from __future__ import annotations

import io
from pathlib import Path

import click
from rich.console import Console
from rich.text import Text

from isthmus.edge_agent.cli.chat import COLOURS, LEGEND, ChatSettings, chat
from isthmus.edge_agent.config import LanguageConfig
from isthmus.edge_agent.language.agent import LanguageAgent
from tests.bench.language import share_cores
from tests.bench.processes import CloudProcess
from tests.bench.proxy import LinkProxy, LinkSpec

QUESTIONS = (("verify", "What is a suspension bridge?"), ("cloud", "Name one of them."), ("edge", "Who invented it?"))
EASY, HARD = "Count from one to ten.", "Why is the sky blue, and red in the evening?"
WITH_HANDOFF = (("auto", EASY), ("auto", HARD), ("handoff", EASY), ("handoff", HARD))


@click.command(epilog="Example: python -m tests.bench.chat --svg runs/chat.svg")
@click.option("--svg", type=click.Path(path_type=Path), required=True)
@click.option("--model", default="smollm2", show_default=True)
@click.option(
    "--handoff", type=click.Path(path_type=Path, exists=True), help="Handoff bundle of the model, for auto and handoff."
)
@click.option("--rtt-ms", default=50.0, show_default=True)
@click.option("--max-tokens", default=72, show_default=True)
def main(svg: Path, model: str, handoff: Path | None, rtt_ms: float, max_tokens: int) -> None:
    """Ask one question by each arm, and an easy and a hard one by arms where the device decides some of the tokens."""
    console = Console(record=True, width=104, force_terminal=True, highlight=False, file=io.StringIO())
    console.print(Text.assemble(*((f"■ {LEGEND[source]}   ", COLOURS[source]) for source in COLOURS)))
    device_cores, cloud_cores = share_cores()
    handoff_arguments = ("--handoff", str(handoff)) if handoff else ()
    cloud = CloudProcess(arguments=("--model", model, *handoff_arguments), cpus=",".join(map(str, cloud_cores)))
    with cloud, LinkProxy(cloud.port, LinkSpec(None, rtt_ms / 1000)) as link:
        target, threads = f"127.0.0.1:{link.port}", len(device_cores)
        config = LanguageConfig(
            model, (target,), connect_s=10.0, threads=threads, handoff=handoff, objective="cheapest"
        )
        with LanguageAgent(config) as agent:
            for arm, question in (*QUESTIONS, *(WITH_HANDOFF if handoff else ())):
                console.print(Text(f"\n{arm} › {question}", style="bold"))
                failed = chat(agent, arm, console, ChatSettings(max_tokens=max_tokens), io.StringIO(question))  # type: ignore[arg-type]
                if failed:
                    raise click.ClickException("an answer failed")
    svg.parent.mkdir(parents=True, exist_ok=True)
    click.echo(console.export_text(styles=True, clear=False))
    console.save_svg(str(svg), title="edge-agent chat")
    click.echo(f"picture: {svg}")


if __name__ == "__main__":
    main()
