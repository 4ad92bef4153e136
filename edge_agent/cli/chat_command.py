"""`edge-agent chat`: settings of a chat, and its start; the chat itself is `chat`."""

from __future__ import annotations

import sys
from dataclasses import replace

import click

from isthmus.edge_agent.cli.clouds import describe_clouds
from isthmus.edge_agent.cli.prompts import SMOLLM2, describe_models, open_prompts, tokenizer_of, warn
from isthmus.edge_agent.cli.settings import settings
from isthmus.edge_agent.config import ChatConfig, LanguageConfig
from isthmus.models.fail import fail, needing
from isthmus.models.messages import Sampling
from isthmus.models.options import Command, read

EXAMPLES = """\b
Examples:
  edge-agent chat --cloud cloud:50051
  edge-agent chat --model smollm2 --handoff smollm2 --cloud cloud:50051
  echo "What is a lagoon?" | edge-agent chat --json"""


@click.command("chat", cls=Command, epilog=EXAMPLES)
@click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object an answer; each line of input is a question."
)
@settings("Chat", "Cloud and device", "Language model")
def chat(as_json: bool) -> None:
    """Chat with a language model in the terminal.

    Each token has the colour of where it was made: on the device, on the device and confirmed by the cloud, or in the
    cloud. A line of figures follows each answer. Without --model the cloud's model answers; without --cloud too,
    smollm2 on the device.
    """
    chosen, config = read(ChatConfig), read(LanguageConfig)
    if config.model is None and not config.clouds:
        config = replace(config, model=SMOLLM2)
    if chosen.arm not in ("auto", "edge") and not config.clouds:
        raise click.UsageError(f"--arm {chosen.arm} needs --cloud")
    sampling = Sampling(chosen.temperature, seed=chosen.seed)
    source = None if sys.stdin.isatty() else sys.stdin
    with needing("edge,llm"):
        from rich.console import Console

        from isthmus.edge_agent.cli.chat import ChatSettings
        from isthmus.edge_agent.cli.chat import chat as start
    with open_prompts(config) as agent:
        tokenizer = tokenizer_of(agent, chosen.arm)
        warn(agent)
        if not tokenizer.has_template:
            fail(f"{agent.name} has no chat template, so it cannot chat; edge-agent run serves it at /v1/completions")
        if source is None and not as_json:
            click.echo(f"{describe_models(agent)}, {describe_clouds(agent.replicas)}")
        details = ChatSettings(chosen.system, chosen.max_tokens, sampling, config.prices, as_json)
        failed = start(agent, chosen.arm, Console(highlight=False), details, source)
    sys.exit(1 if failed else 0)
