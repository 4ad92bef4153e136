"""`cloud-service keys …`, in words for people or as JSON."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from isthmus.cloud_service.quotas import Quota
from isthmus.models.errors import IsthmusError
from isthmus.models.fail import fail
from isthmus.models.options import WIDE

if TYPE_CHECKING:
    from isthmus.cloud_service.keys.folder import KeyFolder

EXAMPLES = """\b
Examples:
  cloud-service keys init --host cloud.example.org
  cloud-service keys device camera-7
  cloud-service --bundle photos --listen 0.0.0.0:50051 --tls-certificate keys/service.pem --tls-key keys/service.key \\
      --tls-client-ca keys/ca.pem --access keys/access.json
  edge-agent run --cloud cloud.example.org:50051 --tls-ca ca.pem --tls-certificate camera-7.pem \
      --tls-key camera-7.key"""
DAYS = click.option("--days", type=click.IntRange(1, 3650), default=365, show_default=True, help="Days it is valid.")


@click.group(epilog=EXAMPLES, context_settings=WIDE)
def keys() -> None:
    """Make and renew certificates and tokens; set quotas; revoke devices.

    A running service takes up what changes within ten seconds.
    """


def command(example: str) -> Callable[[Callable[..., dict[str, Any]]], click.Command]:
    """A command that returns what to print: `text`, and the rest as JSON."""

    def decorate(function: Callable[..., dict[str, Any]]) -> click.Command:
        @functools.wraps(function)
        def run(folder: Path, as_json: bool, **arguments: Any) -> None:
            from isthmus.cloud_service.keys.folder import KeyFolder  # cryptography takes 80 ms to import

            try:
                found = function(KeyFolder(folder), **arguments)
            except IsthmusError as error:
                fail(error)
            text = found.pop("text")
            click.echo(json.dumps(found) if as_json else text)

        made = click.option("--json", "as_json", is_flag=True, help="Print JSON.")(run)
        made = click.option(
            "--folder", type=click.Path(path_type=Path), default="keys", show_default=True, help="Where the files are."
        )(made)
        return keys.command(function.__name__.rstrip("_"), epilog=f"\b\nExample:\n  cloud-service keys {example}")(made)

    return decorate


def files(made: list[Path], nothing: str) -> dict[str, Any]:
    return {"files": [str(path) for path in made], "text": "\n".join(f"made {path}" for path in made) or nothing}


@command("init --host cloud.example.org --host 10.0.0.5")
@click.option("--host", "hosts", multiple=True, default=("localhost", "127.0.0.1"), show_default=True, help="Name or"
              " address by which devices reach the service; repeatable.")  # fmt: skip
@DAYS
def init(folder: KeyFolder, hosts: tuple[str, ...], days: int) -> dict[str, Any]:
    """Make an authority, the service's certificate and the file of devices; what is there already stays."""
    return files(folder.init(hosts, days), "everything is there already")


@command("service --host cloud.example.org")
@click.option("--host", "hosts", multiple=True, required=True, help="As of init; repeatable.")
@DAYS
def service(folder: KeyFolder, hosts: tuple[str, ...], days: int) -> dict[str, Any]:
    """Make a new certificate of the service, for other names."""
    return files(folder.service(hosts, days), "")


@command("device camera-7 camera-8")
@click.argument("names", nargs=-1, required=True)
@DAYS
def device(folder: KeyFolder, names: tuple[str, ...], days: int) -> dict[str, Any]:
    """Make a certificate for each device NAME; former ones stay good until they expire."""
    return files([path for name in names for path in folder.device(name, days)], "")


@command("renew --within 30")
@click.option("--within", type=click.IntRange(0, 3650), default=30, show_default=True, help="Days until they expire.")
@DAYS
def renew(folder: KeyFolder, within: int, days: int) -> dict[str, Any]:
    """Make new certificates, with new keys, for those that expire soon."""
    return files(folder.renew(within, days), f"nothing expires within {within} days")


@command("token camera-7 --out camera-7.token")
@click.argument("name")
@click.option("--out", type=click.Path(path_type=Path), help="File for the token, instead of printing it.")
def token(folder: KeyFolder, name: str, out: Path | None) -> dict[str, Any]:
    """Make a token for the device NAME, shown once; the newest of its former ones stays good."""
    from isthmus.cloud_service.keys.folder import write_whole

    made = folder.token(name)
    if out is None:
        return {"name": name, "token": made, "text": made}
    try:
        write_whole(out, made.encode() + b"\n")
    except OSError as error:
        fail(f"{out}: {(error.strerror or 'failed').lower()}")
    return {"name": name, "files": [str(out)], "text": f"made {out}"}


@command("revoke camera-7")
@click.argument("name")
def revoke(folder: KeyFolder, name: str) -> dict[str, Any]:
    """Revoke every certificate and token that was made for the device NAME; later ones are good."""
    count = folder.revoke(name)
    words = f"revoked {count} certificates and tokens of {name}" if count else f"revoked the name {name}"
    return {"name": name, "revoked": count, "text": words}


@command("limit camera-7 --requests-per-s 5 --session-mb 64")
@click.argument("name", default="*")
@click.option("--requests-per-s", type=click.FloatRange(0, min_open=True), help="Photos and prompts a second.")
@click.option("--bytes-per-s", type=click.FloatRange(0, min_open=True), help="Bytes a second that it sends.")
@click.option(
    "--tokens-per-s", type=click.FloatRange(0, min_open=True), help="Tokens a second, of prompts and answers."
)
@click.option("--session-mb", type=click.FloatRange(0, min_open=True), help="Mebibytes of KV caches of its sessions.")
def limit(folder: KeyFolder, name: str, **quota: float | None) -> dict[str, Any]:
    """Set what the device NAME may use, or '*' for every one without a quota of its own; nothing given: no limit."""
    folder.limit(name, Quota(**quota))
    return {"name": name, "quota": quota, "text": f"set the quota of {name}"}


@command("list")
def list_(folder: KeyFolder) -> dict[str, Any]:
    """List certificates and when they expire."""
    found = [
        {"name": name, "not_after": certificate.not_valid_after_utc.isoformat()}
        for name, certificate in folder.certificates()
    ]
    return {"certificates": found, "text": "\n".join(f"{each['not_after'][:16]}  {each['name']}" for each in found)}
