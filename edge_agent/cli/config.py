"""`edge-agent config`: check the settings, and show where each comes from."""

from __future__ import annotations

import click

from isthmus.edge_agent.cli.settings import SECTIONS, settings
from isthmus.edge_agent.config import ChatConfig, EdgeConfig, HttpConfig, LanguageConfig
from isthmus.models.options import Command, describe, read

EXAMPLES = """\b
Examples:
  edge-agent config --show
  edge-agent config --config edge.toml
  ISTHMUS_EDGE_MODE=edge edge-agent config --show --json"""


@click.command(cls=Command, epilog=EXAMPLES)
@click.option("--show", is_flag=True, help="Print each setting, its value and where that comes from.")
@click.option("--json", "as_json", is_flag=True, help="Print them as JSON.")
@settings(*SECTIONS)
def config(show: bool, as_json: bool) -> None:
    """Check or show the settings.

    They come from options, environment names and a file, as for the other commands; nothing is started.
    """
    read(EdgeConfig)
    read(HttpConfig)
    read(ChatConfig)
    read(LanguageConfig)
    if show or as_json:
        click.echo(describe(as_json))
    else:
        click.echo("ok: the settings are valid; --show prints them")
