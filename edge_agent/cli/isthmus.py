"""The program `isthmus`: what devices and clouds have in common."""

from __future__ import annotations

import click

from isthmus.edge_agent.cli.pull import pull
from isthmus.models.options import WIDE

EXAMPLES = """\b
Examples:
  isthmus pull fashion      install a bundle, to be used as --bundle fashion

\b
The other programs:
  edge-agent --help         the device: answers photos and prompts
  cloud-service --help      the cloud: answers what devices find hard"""


@click.group(epilog=EXAMPLES, context_settings=WIDE)
@click.version_option(package_name="isthmus", prog_name="isthmus")
def main() -> None:
    """Isthmus: one model split between a device and a cloud. This program gets the bundles that both sides open."""


main.add_command(pull)
