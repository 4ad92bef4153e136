"""Command line of `python -m isthmus.models.bundle`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import click

from isthmus.models.bundle.bundle import Bundle, Files, kind_of, read_manifest
from isthmus.models.errors import BundleError
from isthmus.models.language.handoff.hidden_states import StateCodec
from isthmus.models.language.handoff.manifest import HandoffManifest
from isthmus.models.vision.manifest import Head, Manifest, Precision, Segment, Tap

SHOWN_LABELS = 10  # of a task


@click.group(epilog="Example: python -m isthmus.models.bundle verify models/zoo/elpv")
def main() -> None:
    """Look at a bundle, or check every byte of it."""


@main.command(epilog="Example: python -m isthmus.models.bundle inspect models/zoo/elpv --json")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the manifest as JSON.")
def inspect(folder: Path, as_json: bool) -> None:
    """Print what FOLDER says of itself; every byte is verified first."""
    manifest = opened(folder)
    if as_json:
        click.echo(manifest.model_dump_json(indent=1, exclude_none=True))
    else:
        click.echo("\n".join(summary(manifest) if isinstance(manifest, Manifest) else handoff_summary(manifest)))


@main.command(epilog="Example: python -m isthmus.models.bundle verify models/zoo/elpv")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def verify(folder: Path, as_json: bool) -> None:
    """Check every file of FOLDER against its manifest, and the integer tables against each other."""
    manifest = opened(folder)
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


def opened(folder: Path) -> Manifest | HandoffManifest:
    """Open and check a bundle of either kind, or end the program with one line."""
    try:
        if kind_of(folder) is HandoffManifest:
            handoff = read_manifest(folder, HandoffManifest)
            files = Files(folder, handoff.files)
            files.check()
            StateCodec(files.tensors(handoff.states), handoff.hidden, len(handoff.rates), handoff.max_state_bytes)
            return handoff
        bundle = Bundle.open(folder)
        for tap in range(len(bundle.manifest.taps)):
            bundle.codec(tap)
        if bundle.manifest.weights:
            bundle.tensors(bundle.manifest.weights)
    except BundleError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(1)
    return bundle.manifest


def summary(manifest: Manifest) -> list[str]:
    """A page for a person."""
    lines = [
        f"{manifest.name}: {', '.join(task.name for task in manifest.tasks)}; {manifest.licence}",
        f"fingerprint  {manifest.fingerprint}",
        f"made by      {manifest.training.command} (seed {manifest.training.seed}, {manifest.training.seconds:.0f} s)",
        f"input        {manifest.preprocessing.crop[0]}x{manifest.preprocessing.crop[1]} RGB",
    ]
    for task in manifest.tasks:
        more = f" and {len(task.labels) - SHOWN_LABELS} more" if len(task.labels) > SHOWN_LABELS else ""
        lines.append(f"task {task.name}: {', '.join(task.labels[:SHOWN_LABELS])}{more}")
    for precision, head in manifest.heads.items():
        lines += head_table(precision, head, manifest.segments)
    for tap, built in zip(manifest.taps, manifest.architecture.taps, strict=True):
        lines += tap_table(tap, built.after)
    for name, score in manifest.scores.items():
        lines.append(f"{name:<24} {score.value:.4f} [{score.low:.4f}, {score.high:.4f}] n={score.samples}")
    return lines


def handoff_summary(manifest: HandoffManifest) -> list[str]:
    """A page for a person."""
    made = manifest.training
    lines = [
        f"{manifest.name}: exits and hidden states of the model {manifest.base[:12]}…; {manifest.licence}",
        f"fingerprint  {manifest.fingerprint}",
        f"made by      {made.command} (seed {made.seed}, {made.seconds:.0f} s)",
    ]
    for exit_ in manifest.exits:
        lines.append(f"exit behind {exit_.depth} layers: its choice is the model's for {exit_.agreement:.1%} of tokens")
    for threshold in manifest.thresholds[::5]:
        lines.append(
            f"    from {threshold.confidence:.2f}: {threshold.coverage:.1%} of tokens decided,"
            f" {threshold.agreement:.1%} of them as the model would"
        )
    for index, rate in enumerate(manifest.rates):
        lines.append(f"rate {index}: {rate.mean_bytes:.0f} B a row")
    for index, point in enumerate(manifest.points):
        lines.append(
            f"point {index}: rows that decide at rate {point.rate}, others at {point.context_rate}:"
            f" {point.mean_bytes:.0f} B, {point.agreement:.1%} of tokens decided from them as the model would"
        )
    for name, score in manifest.scores.items():
        lines.append(f"{name:<32} {score.value:.4f} [{score.low:.4f}, {score.high:.4f}] n={score.samples}")
    return lines


def head_table(precision: Precision, head: Head, segments: Sequence[Segment]) -> list[str]:
    """A line about a head, then one for each of its exits and thresholds."""
    lines = [f"head {precision}:"]
    for segment, exit_ in zip(segments, head.exits, strict=True):
        lines.append(
            f"    {exit_.name:<10} after {segment.output}, {segment.macs / 1e6:.0f} MMAC:"
            f" accuracy {exit_.accuracy:.3f}, agreement {exit_.agreement:.3f}"
        )
    for threshold in head.thresholds:
        lines.append(
            f"    exit from  {threshold.confidence:.3f}: loss <= {threshold.epsilon:.1%} with confidence"
            f" {1 - threshold.delta:.0%} (n={threshold.samples}, coverage {threshold.coverage:.1%})"
        )
    return lines


def tap_table(tap: Tap, after: int) -> list[str]:
    """A line about a tap, then one for each of its widths and rates."""
    where = f"behind segment {after - 1}" if after else "of the image"
    latent = "x".join(map(str, tap.latent))
    lines = [
        f"tap {tap.name}: {where}, latent {latent}, at most {tap.max_payload_bytes} B,"
        f" decoder and tail {tap.tail_macs / 1e6:.0f} MMAC",
        "    width  encoder MMAC  rate  mean B  max B  accuracy  agreement",
    ]
    for width in tap.widths:
        for index, rate in enumerate(width.rates):
            lines.append(
                f"    {width.width:5g}  {width.encoder_macs / 1e6:12.1f}  {index:4}  {rate.mean_bytes:6.0f}"
                f"  {rate.max_bytes:5}  {rate.accuracy:8.3f}  {rate.agreement:9.3f}"
            )
    return lines
