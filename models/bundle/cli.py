"""Command line of `python -m isthmus.models.bundle`."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import click

from isthmus.models.bundle.files import kind_of
from isthmus.models.bundle.manifest import BundleManifest
from isthmus.models.errors import BundleError

# `kind` of a manifest -> module of the wing that verifies it and prints a summary. By name: no import leads to a wing.
WINGS: dict[str | None, str] = {
    None: "isthmus.models.vision.inspect",
    "handoff": "isthmus.models.language.handoff.inspect",
    "router": "isthmus.models.language.router.inspect",
    "language": "isthmus.models.language.checkpoint.inspect",
}


@click.group(epilog="Example: python -m isthmus.models.bundle verify models/zoo/elpv")
def main() -> None:
    """Inspect or verify a bundle."""


@main.command(epilog="Example: python -m isthmus.models.bundle inspect models/zoo/elpv --json")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the manifest as JSON.")
def inspect(folder: Path, as_json: bool) -> None:
    """Verify the bundle FOLDER, then print a summary."""
    manifest, wing = opened(folder)
    if as_json:
        click.echo(manifest.model_dump_json(indent=1, exclude_none=True))
    else:
        click.echo("\n".join(wing.summary(manifest)))


@main.command(epilog="Example: python -m isthmus.models.bundle verify models/zoo/elpv")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def verify(folder: Path, as_json: bool) -> None:
    """Verify size and hash of every file of the bundle FOLDER, and that weights and integer tables are readable."""
    manifest, _ = opened(folder)
    size = sum(entry.size for entry in manifest.files.values())
    result = {
        "name": manifest.name,
        "fingerprint": manifest.fingerprint,
        "files": len(manifest.files),
        "bytes": size,
        "ok": True,
    }
    click.echo(
        json.dumps(result)
        if as_json
        else f"ok: {folder}: {result['files']} files, {size} bytes, {manifest.fingerprint}"
    )


def opened(folder: Path) -> tuple[BundleManifest, Any]:
    """Verify a bundle of any kind: its manifest, and the module of its wing. Exits with one line on errors."""
    try:
        wing = importlib.import_module(WINGS.get(kind_of(folder), WINGS[None]))
        return wing.verify(folder), wing
    except BundleError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(1)
