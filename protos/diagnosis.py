"""What `doctor` of both programs finds, and what to do about it. Changes nothing."""

from __future__ import annotations

import datetime
import json
import stat
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, NoReturn

import click

from isthmus.models.bundle.files import Files, read_manifest
from isthmus.models.bundle.manifest import BundleManifest
from isthmus.models.errors import IsthmusError
from isthmus.protos.certificates import expiry_problem, load_certificates, read_pem

EXPIRES_SOON = datetime.timedelta(days=14)
CLOCK_FIX = "set the clock (timedatectl, NTP): certificates are judged by it"
MARKS = {"ok": "ok      ", "warning": "warning ", "wrong": "WRONG   "}


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at. `fix`: what to do, where something is not well."""

    what: str
    state: Literal["ok", "warning", "wrong"]
    text: str
    fix: str = ""


def tell(findings: Iterable[Finding], as_json: bool) -> NoReturn:
    """Print each finding as it is made, or all as JSON, and end the program: with 1 where something is wrong."""
    found = []
    for finding in findings:
        found.append(finding)
        if not as_json:
            fix = f"\n         -> {finding.fix}" if finding.fix else ""
            click.echo(f"{MARKS[finding.state]} {finding.what}: {finding.text}{fix}")
    healthy = all(finding.state != "wrong" for finding in found)
    if as_json:
        click.echo(json.dumps({"healthy": healthy, "findings": [asdict(finding) for finding in found]}))
    sys.exit(0 if healthy else 1)


def attempt(what: str, check: Callable[[], str], fix: str) -> Finding:
    """`check` says what it found; what it raises is wrong."""
    try:
        return Finding(what, "ok", check())
    except IsthmusError as error:
        return Finding(what, "wrong", str(error), fix)


def look_at_clock() -> Finding:
    """A clock before this file was installed is wrong for sure."""
    now, installed_s = time.time(), Path(__file__).stat().st_mtime
    text = f"{datetime.datetime.fromtimestamp(now, datetime.UTC):%Y-%m-%d %H:%M} UTC"
    if now < installed_s:
        return Finding("clock", "wrong", f"{text}, before this program was installed", CLOCK_FIX)
    return Finding("clock", "ok", text)


def look_at_bundle(folder: Path, schema: type[BundleManifest]) -> Finding:
    def check() -> str:
        manifest = read_manifest(folder, schema)
        Files(folder, manifest.files).check()
        return f"{manifest.name} {manifest.fingerprint[:12]}, {len(manifest.files)} files are whole"

    return attempt(f"bundle {folder}", check, "copy the bundle again, or `isthmus pull` it")


def look_at_certificate(path: Path) -> Finding:
    """Whether the first certificate of a file is valid now, and for how long."""
    what = f"certificate {path}"
    try:
        first = load_certificates(path, read_pem(path))[0]
    except IsthmusError as error:
        return Finding(what, "wrong", str(error), "give a PEM file, which begins with -----BEGIN CERTIFICATE-----")
    if (problem := expiry_problem(first)) is not None:
        return Finding(what, "wrong", problem, "renew it (`cloud-service keys renew`), or set the clock")
    until = first.not_valid_after_utc
    text = f"valid until {until:%Y-%m-%d}"
    if until - datetime.datetime.now(datetime.UTC) < EXPIRES_SOON:
        return Finding(what, "warning", text, "renew it soon (`cloud-service keys renew`)")
    return Finding(what, "ok", text)


def look_at_secrecy(path: Path) -> Finding:
    """Whether others on this machine may read a key or token."""
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
    except OSError as error:
        return Finding(
            f"secret {path}", "wrong", (error.strerror or "cannot be read").lower(), "give a file that exists"
        )
    if mode & 0o077:
        return Finding(f"secret {path}", "warning", f"mode {mode:o}: others may read it", f"chmod 600 {path}")
    return Finding(f"secret {path}", "ok", "for its owner alone")
