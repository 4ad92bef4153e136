"""`isthmus pull`: fetch a bundle, verify every byte, put it in place in one step.

source -> hidden folder beside the place -> manifest, sizes, SHA-256 -> rename
"""

from __future__ import annotations

import json
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import click
from pydantic import BaseModel, ConfigDict, ValidationError

from isthmus.edge_agent.cli.sources import MAX_BUNDLE_BYTES, Begin, Progress, Source, copy, locate, translated
from isthmus.models.bundle.files import (
    MANIFEST,
    MAX_MANIFEST_BYTES,
    Files,
    check_replaceable,
    fingerprint_of,
    first_problem,
    put_in_place,
    read_json,
)
from isthmus.models.bundle.installed import user_folder
from isthmus.models.bundle.manifest import FileEntry, FileName, Name, Sha256
from isthmus.models.errors import BundleError, InvalidInput, IsthmusError
from isthmus.models.fail import fail

BAR_FROM_BYTES = 4 << 20  # less has come before a bar could be read
EXAMPLES = """\b
Examples:
  isthmus pull fashion
  isthmus pull https://example.org/bundles/photos
  isthmus pull bundles.zip --bundle elpv --to /srv/bundles

A pulled bundle is used by its name: edge-agent infer photo.jpg --bundle fashion"""


class Listing(BaseModel):
    """What a manifest of any kind says of its files."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    schema_version: Literal[3, 4]
    name: Name
    files: dict[FileName, FileEntry]
    fingerprint: Sha256


@dataclass(frozen=True, slots=True)
class Pulled:
    """A bundle that is in place. `new`: it was not there before."""

    name: str
    fingerprint: str
    folder: str
    files: int
    bytes: int
    new: bool


@click.command(epilog=EXAMPLES)
@click.argument("source", metavar="NAME|URL|PATH")
@click.option(
    "--to",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder of bundles to put it in.  [default: isthmus/bundles in $XDG_DATA_HOME or ~/.local/share]",
)
@click.option("--bundle", "choice", metavar="NAME", help="Which bundle, where an archive holds several.")
@click.option("--force", is_flag=True, help="Replace another bundle of the same name.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def pull(source: str, to: Path | None, choice: str | None, force: bool, as_json: bool) -> None:
    """Fetch a bundle and verify it.

    Every file is checked against the size and the SHA-256 in the bundle's manifest before the bundle is put in place.

    NAME is a bundle in ISTHMUS_BUNDLES (a folder or an http(s) address of bundles), or one that comes with this
    package. URL and PATH name a folder with a manifest.json, or a zip, wheel or tar file.
    """
    with ExitStack() as stack:
        progress = bars(stack)
        try:
            found = stack.enter_context(locate(source, choice, progress))
            result = install(found, to or user_folder(), force, progress)
        except IsthmusError as error:
            stack.close()
            fail(error)
    if as_json:
        click.echo(json.dumps(asdict(result)))
    else:
        how = "pulled" if result.new else "already there, every byte checked"
        click.echo(f"{result.name}: {how}: {result.folder}, {result.files} files, {result.bytes / 1e6:.1f} MB")


def install(source: Source, to: Path, force: bool, progress: Begin) -> Pulled:
    """Copy, verify and place a bundle in the folder `to`. Nothing is left there when it fails.

    Raises BundleError, InvalidInput, LinkDown.
    """
    with translated(str(to)):
        to.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(prefix=".pull-", dir=to)
    with scratch:
        partial = Path(scratch.name) / "new"
        partial.mkdir()
        store(source, MANIFEST, partial, MAX_MANIFEST_BYTES, lambda count: None)
        listing = read_listing(partial)
        size = sum(entry.size for entry in listing.files.values())
        if size > MAX_BUNDLE_BYTES:
            raise BundleError(f"{listing.name}: {size} bytes, at most {MAX_BUNDLE_BYTES} are fetched")
        folder = to / listing.name
        result = Pulled(listing.name, listing.fingerprint, str(folder), len(listing.files), size, new=True)
        if is_there(folder, listing, force):
            return replace(result, new=False)
        advance = progress(listing.name, size)
        for name, entry in listing.files.items():
            store(source, name, partial, entry.size, advance)
        try:
            Files(partial, listing.files).check()
        except BundleError as error:
            raise BundleError(str(error).replace(f"{partial}/", "")) from error
        with translated(str(folder)):
            put_in_place(partial, folder, Path(scratch.name) / "old")
    return result


def store(source: Source, name: str, folder: Path, limit: int, progress: Progress) -> None:
    """One file of the bundle. Raises InvalidInput when it is longer than `limit` bytes."""
    with translated(name), source.open(name) as stream, (folder / name).open("xb") as file:
        copy(stream, file, name, limit, progress)


def read_listing(folder: Path) -> Listing:
    """What is listed, its fingerprint checked. Raises BundleError."""
    content = read_json(folder)
    try:
        listing = Listing.model_validate(content)
    except ValidationError as error:
        raise BundleError(f"{MANIFEST}: {first_problem(error)}") from error
    if (found := fingerprint_of(content)) != listing.fingerprint:
        raise BundleError(f"{MANIFEST}: content has fingerprint {found[:12]}…, it claims {listing.fingerprint[:12]}…")
    return listing


def is_there(folder: Path, listing: Listing, force: bool) -> bool:
    """Whether this very bundle is in place, whole.

    Raises InvalidInput when another is, unless `force`, and when it is no bundle.
    """
    if not folder.exists() and not folder.is_symlink():
        return False
    try:
        same = read_listing(folder).fingerprint == listing.fingerprint
        if same:
            Files(folder, listing.files).check()
            return True
    except BundleError:
        same = False  # broken: it is replaced only when asked for, it may be somebody's work
    if not force:
        raise InvalidInput(f"{folder}: another bundle, or a changed one, is there; --force replaces it")
    check_replaceable(folder)
    return False


def bars(stack: ExitStack) -> Begin:
    """Progress bars on a terminal's standard error, of what is large."""

    def begin(name: str, size: int | None) -> Progress:
        hidden = not sys.stderr.isatty() or (size or 0) < BAR_FROM_BYTES
        bar = stack.enter_context(click.progressbar(length=size or 1, label=name, file=sys.stderr, hidden=hidden))
        return bar.update

    return begin
