"""`edge-agent plan`: what the router would do on a grid of links, by the speeds of this device or of saved ones."""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from isthmus.edge_agent.cli.settings import settings
from isthmus.edge_agent.config import EdgeConfig
from isthmus.models.bundle.installed import find, missing
from isthmus.models.errors import InvalidInput, IsthmusError
from isthmus.models.fail import fail, needing
from isthmus.models.options import Command, read

if TYPE_CHECKING:
    from isthmus.edge_agent.vision.device_profile import DeviceProfile
    from isthmus.edge_agent.vision.forecast import Expectation
    from isthmus.models.vision.bundle import Bundle
    from isthmus.models.vision.manifest import Precision

MBITS, RTTS_MS = (0.25, 1.0, 5.0, 25.0, 100.0), (5.0, 20.0, 50.0, 100.0, 150.0)
LINK = re.compile(r"(\d+(?:\.\d+)?)/(\d+(?:\.\d+)?)")
EXAMPLES = """\b
Examples:
  edge-agent plan --bundle elpv                         this device, 25 links
  edge-agent plan --bundle elpv --link 2/40             2 Mbit/s, 40 ms of round trip
  edge-agent plan --bundle elpv --save camera.json      keep the speeds of this device
  edge-agent plan elpv photos --device camera.json --device gateway.json
                                                        which bundle and precision fits which device"""


@dataclass(frozen=True)
class Candidate:
    """A bundle at one precision on one device, and what to expect on each link."""

    device: str
    bundle: str
    precision: Precision
    expected: tuple[Expectation, ...]

    def mean(self, figure: str) -> float:
        """Over the links."""
        return sum(float(getattr(each, figure)) for each in self.expected) / len(self.expected)


def parse_links(context: click.Context, option: click.Parameter, values: Sequence[str]) -> list[tuple[float, float]]:
    """MBIT/MS each; the grid for none."""
    found = []
    for value in values:
        match = LINK.fullmatch(value)
        if match is None or not float(match[1]) > 0:
            raise click.BadParameter(f"{value!r:.40} is no link, expected Mbit/s and ms of round trip, such as 2/40")
        found.append((float(match[1]), float(match[2])))
    return found or [(mbit, rtt_ms) for mbit in MBITS for rtt_ms in RTTS_MS]


@click.command(cls=Command, epilog=EXAMPLES)
@click.argument("bundles", nargs=-1, type=click.Path(path_type=Path))
@click.option(
    "--link", "links", multiple=True, callback=parse_links, metavar="MBIT/MS",
    help="Bandwidth in Mbit/s and round trip in ms; repeatable.  [default: a grid of 25]",
)  # fmt: skip
@click.option(
    "--device", "devices", multiple=True, type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Speeds that --save has kept, on this device or another, in place of measuring; repeatable.",
)  # fmt: skip
@click.option("--save", type=click.Path(path_type=Path, dir_okay=False), help="Keep the measured speeds here (JSON).")
@click.option(
    "--cloud-ms", type=click.FloatRange(0, min_open=True),
    help="Milliseconds of the cloud for a whole photo, queue included.  [default: what an agent assumes at first]",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--plot", "plot_path", type=click.Path(path_type=Path, dir_okay=False), help="Draw the map here (PNG).")
@settings("Cloud and device", "Photos")
def plan(
    bundles: tuple[Path, ...],
    links: list[tuple[float, float]],
    devices: tuple[Path, ...],
    save: Path | None,
    cloud_ms: float | None,
    as_json: bool,
    plot_path: Path | None,
) -> None:
    """What the router would do with photos on each link: cut, width, rate, exits, latency, bytes, agreement.

    Measures the bundle on this device, or takes the speeds of devices that --save has kept. No cloud is needed, nothing
    is sent. BUNDLES are compared, each at every precision; without them it is --bundle at --precision.
    """
    if devices and save:
        raise click.UsageError("--save keeps what is measured here, and --device measures nothing: give one of them")
    config = read(EdgeConfig)
    with needing("edge"):
        from isthmus.edge_agent.cli.plan_map import as_rows, draw, tables
        from isthmus.edge_agent.vision.device_profile import measure_profile, read_profile
    try:
        opened = open_bundles(bundles or (config.bundle,))
        pairs = [(each, precision) for each in opened for precision in precisions(each, config, bool(bundles))]
        profiles = [read_profile(path) for path in devices] or [measure_profile(platform.node(), pairs, config.threads)]
        if save:
            save.write_text(profiles[0].model_dump_json(indent=1) + "\n", encoding="utf-8")
        found = forecasts(profiles, pairs, config, links, cloud_ms)
        if plot_path:
            draw(found, links, plot_path)
    except (IsthmusError, OSError) as error:
        fail(error)
    click.echo(json.dumps(as_rows(found, links), indent=1) if as_json else "\n".join(tables(found, links)))


def open_bundles(paths: Sequence[Path]) -> list[Bundle]:
    """Raises BundleError."""
    from isthmus.models.vision.bundle import Bundle

    found = [find(path) for path in paths]
    if problem := next(filter(None, map(missing, found)), None):
        raise InvalidInput(problem)
    return [Bundle.open(path) for path in found]


def precisions(bundle: Bundle, config: EdgeConfig, every: bool) -> list[Precision]:
    """Those to look at. Raises InvalidInput."""
    there = bundle.manifest.heads
    if not every and config.precision not in there:
        raise InvalidInput(f"{bundle.folder}: there is no precision {config.precision}, there are {', '.join(there)}")
    return list(there) if every else [config.precision]


def forecasts(
    profiles: Sequence[DeviceProfile],
    pairs: Sequence[tuple[Bundle, Precision]],
    config: EdgeConfig,
    links: Sequence[tuple[float, float]],
    cloud_ms: float | None,
) -> list[Candidate]:
    """Every device with every bundle and precision. Raises InvalidInput if a profile lacks one."""
    from isthmus.edge_agent.policy.estimates import LinkEstimate
    from isthmus.edge_agent.vision.forecast import expect

    cloud_s = None if cloud_ms is None else cloud_ms / 1000
    found = []
    for profile in profiles:
        for bundle, precision in pairs:
            speeds, chosen = (
                profile.speeds(bundle, precision),
                replace(config, bundle=bundle.folder, precision=precision),
            )
            expected = [
                expect(bundle.manifest, speeds, chosen, LinkEstimate(rtt_ms / 1000, mbit * 125_000), cloud_s)
                for mbit, rtt_ms in links
            ]
            found.append(Candidate(profile.device, bundle.manifest.name, precision, tuple(expected)))
    return found
