"""The program `edge-agent`: its commands. Each reads its settings once, as `models.options` says."""

from __future__ import annotations

import click

from isthmus.edge_agent.cli.chat_command import chat
from isthmus.edge_agent.cli.config import config
from isthmus.edge_agent.cli.doctor import doctor
from isthmus.edge_agent.cli.explain import explain
from isthmus.edge_agent.cli.infer import infer
from isthmus.edge_agent.cli.plan import plan
from isthmus.edge_agent.cli.recalibrate import recalibrate
from isthmus.edge_agent.cli.run import run
from isthmus.edge_agent.cli.watch import watch
from isthmus.models.options import WIDE

EXAMPLES = """\b
Examples:
  edge-agent infer photo.jpg                        one answer, made on this device
  edge-agent infer photo.jpg --cloud cloud:50051    hard photos go to the cloud
  edge-agent explain photo.jpg --cloud cloud:50051  why, and what else was considered
  edge-agent watch clip.mp4 --cloud cloud:50051     the frames of cameras and clips, each accounted for
  edge-agent chat --cloud cloud:50051               the cloud's language model in the terminal
  edge-agent run --cloud cloud:50051                the same over HTTP
  edge-agent plan --bundle elpv                     what the router would do on 25 links
  edge-agent recalibrate                            new thresholds from audited photos, after an alarm
  edge-agent doctor --cloud cloud:50051             what is wrong with this device, and what to fix"""


@click.group(epilog=EXAMPLES, context_settings=WIDE)
@click.version_option(package_name="isthmus", prog_name="edge-agent")
def main() -> None:
    """The edge half of Isthmus: answers photos and prompts on this device, and sends what is hard to the cloud."""


for command in (infer, watch, explain, recalibrate, run, chat, plan, config, doctor):
    main.add_command(command)
