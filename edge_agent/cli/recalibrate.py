"""`edge-agent recalibrate`: new thresholds of a bundle's exits from audited photos, without labels."""

from __future__ import annotations

import json
import sqlite3
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from isthmus.edge_agent.cli.photos import check
from isthmus.edge_agent.cli.settings import settings
from isthmus.edge_agent.config import EdgeConfig
from isthmus.edge_agent.policy.audit import Audit, Pair, pairs_needed
from isthmus.models.errors import InvalidInput, IsthmusError
from isthmus.models.fail import fail, needing
from isthmus.models.options import Command, read

if TYPE_CHECKING:
    from isthmus.edge_agent.policy.recalibration import Certificate
    from isthmus.edge_agent.vision.audited_pairs import AuditedPairs

EXAMPLES = """\b
Examples:
  edge-agent recalibrate
  edge-agent recalibrate --bundle elpv --epsilon 0.01 --json"""


@click.command(cls=Command, epilog=EXAMPLES)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@settings("Cloud and device", "Photos")
def recalibrate(as_json: bool) -> None:
    """Make new thresholds of the exits from audited photos.

    The pairs are those that the agent has audited since its alarm, or all where there was none. They need no labels:
    the new thresholds are certified to differ from the cloud's model in no more photos than the old ones did. A running
    agent uses them from its next audited photo on, and its alarm ends.
    """
    config = read(EdgeConfig)
    check(config)
    try:
        audit, certificates = renew(config)
    except (IsthmusError, sqlite3.Error) as error:
        fail(error)
    found = certificates[0]
    if as_json:
        click.echo(json.dumps({"promised": audit.epsilon, "certificates": [asdict(each) for each in certificates]}))
        return
    click.echo(
        f"{found.pairs} audited photos: exits answer {found.coverage:.1%} of them from a score of"
        f" {found.level.confidences[0]:.3f}, and differ from the cloud's model in {found.disagreement:.2%}; certified:"
        f" at most {found.epsilon:.2%} of all photos, with confidence {1 - found.delta:.0%}"
    )


def renew(config: EdgeConfig) -> tuple[Audit, list[Certificate]]:
    """Certify new levels and keep them. Raises InvalidInput with what is lacking, BundleError, sqlite3.Error."""
    with needing("edge"):
        from isthmus.edge_agent.vision.audit import STATE, audited_levels
        from isthmus.edge_agent.vision.audited_pairs import AuditedPairs, pairs_path
        from isthmus.models.bundle.files import read_manifest
        from isthmus.models.vision.manifest import Manifest

    manifest = read_manifest(config.bundle, Manifest)
    if config.precision not in manifest.heads:
        raise InvalidInput(f"{manifest.name} has no head of precision {config.precision}")
    path = pairs_path(config.audits.folder, manifest.name, manifest.fingerprint, config.precision)
    if not path.exists():
        raise InvalidInput(f"there are no audited pairs in {path}: an agent audits photos while it has a cloud")
    described = manifest.heads[config.precision]
    audit = Audit(*audited_levels(described, config.epsilon, config.promise, config.among), share=config.audits.share)
    pairs = AuditedPairs(path)
    try:
        with pairs.entry() as state:
            found = certified(audit, pairs, state, STATE)
    finally:
        pairs.close()
    return audit, found


def certified(audit: Audit, pairs: AuditedPairs, state: dict[str, Any], key: str) -> list[Certificate]:
    """New levels from the pairs, put into `state`. Raises InvalidInput where the pairs do not certify any."""
    with needing("edge"):
        from isthmus.edge_agent.policy.recalibration import recalibrated

    try:
        if key in state:
            audit.load(state[key])
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidInput(f"the audit's state is not readable: {error!r}") from error
    known = pairs.pairs(in_alarm=audit.alarm)
    found = recalibrated(known, audit.epsilon)
    if not found:
        raise InvalidInput(lacking(known, audit))
    audit.renew([each.level for each in found])
    pairs.alarm_ended()
    state[key] = audit.dump()
    return found


def lacking(known: list[Pair], audit: Audit) -> str:
    """Why the pairs certify nothing, and how many are needed."""
    since = " since the alarm" if audit.alarm else ""
    needed = pairs_needed(audit.epsilon)
    if len(known) < needed:
        return (
            f"{len(known)} audited pairs{since} are too few: at least {needed} are needed to certify that exits differ"
            f" in at most {audit.epsilon:.2%} of photos"
        )
    return (
        f"{len(known)} audited pairs{since} certify no threshold: even the exits' most confident answers differ from"
        f" the cloud's model too often to promise at most {audit.epsilon:.2%}"
    )
