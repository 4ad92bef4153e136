"""A model on disk: a folder with a manifest, weights, ONNX graphs and integer tables.

    manifest.json   a schema derived from `bundle.manifest.BundleManifest`; lists every other file with size and SHA-256
    fingerprint     SHA-256 of the manifest as canonical JSON without this field; it identifies every byte of the bundle

Knows no kind of model: each wing has a manifest schema of its own.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import NDArray
from pydantic import ValidationError

from isthmus.models.bundle.manifest import BundleManifest, FileEntry
from isthmus.models.errors import BundleError, InvalidInput

MANIFEST = "manifest.json"
MAX_MANIFEST_BYTES = 8 << 20  # 100,000 labels of 80 bytes

Schema = TypeVar("Schema", bound=BundleManifest)


class Files:
    """The files of a bundle, verified against its manifest as they are read."""

    def __init__(self, folder: Path, entries: Mapping[str, FileEntry]) -> None:
        self.folder = folder
        self._entries = entries

    def check(self) -> None:
        """Raises BundleError naming the first file that is missing or differs from its entry."""
        for name in self._entries:
            self.read(name)

    def read(self, name: str) -> bytes:
        """The bytes of one file. Raises BundleError when its size or hash differs from its entry."""
        entry = self._entries.get(name)
        if entry is None:
            raise BundleError(f"{self.folder}: the manifest lists no file {name}")
        data = read_plain(self.folder / name, entry.size)
        if len(data) != entry.size:
            raise BundleError(f"{self.folder / name}: {len(data)} bytes, the manifest says {entry.size}")
        if (found := hashlib.sha256(data).hexdigest()) != entry.sha256:
            raise BundleError(f"{self.folder / name}: SHA-256 is {found[:12]}…, the manifest says {entry.sha256[:12]}…")
        return data

    def tensors(self, name: str) -> dict[str, NDArray[Any]]:
        """The arrays of a safetensors file. Raises BundleError when it cannot be parsed or a float is not finite."""
        try:
            tensors = safetensors.numpy.load(self.read(name))
        except (safetensors.SafetensorError, ValueError, KeyError) as error:
            raise BundleError(f"{self.folder / name}: not a safetensors file: {error}") from error
        for key, array in tensors.items():
            if np.issubdtype(array.dtype, np.floating) and not np.isfinite(array).all():
                raise BundleError(f"{self.folder / name}: tensor {key} holds values that are not finite")
        return tensors


def read_manifest(folder: Path, schema: type[Schema]) -> Schema:
    """Parse and validate `folder/manifest.json`, fingerprint included. Raises BundleError."""
    path, content = folder / MANIFEST, read_json(folder)
    if content.get("schema_version") != schema.VERSION:
        found = str(content.get("schema_version"))[:20]
        raise BundleError(f"{path}: schema_version {found}, this program reads {schema.VERSION}")
    try:
        manifest = schema.model_validate(content)
    except ValidationError as error:
        raise BundleError(f"{path}: {first_problem(error)}") from error
    if (found := fingerprint_of(content)) != manifest.fingerprint:
        raise BundleError(f"{path}: content has fingerprint {found[:12]}…, it claims {manifest.fingerprint[:12]}…")
    return manifest


def kind_of(folder: Path) -> str | None:
    """The `kind` that a folder's manifest states, None where it states none. Raises BundleError."""
    kind = read_json(folder).get("kind")
    return kind if isinstance(kind, str) else None


def read_json(folder: Path) -> dict[str, Any]:
    """A manifest's JSON object, not validated. Raises BundleError."""
    if not folder.is_dir():
        raise BundleError(f"{folder}: no such bundle folder")
    path = folder / MANIFEST
    raw = read_plain(path, MAX_MANIFEST_BYTES)
    if len(raw) > MAX_MANIFEST_BYTES:
        raise BundleError(f"{path}: larger than {MAX_MANIFEST_BYTES} bytes")
    try:
        content = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path}: not JSON: {error}") from error
    if not isinstance(content, dict):
        raise BundleError(f"{path}: expected a JSON object")
    return content


def write_bundle(folder: Path, manifest: Mapping[str, Any], files: Mapping[str, bytes], schema: type[Schema]) -> Path:
    """Write a bundle atomically: to a temporary folder, which is verified, then renamed to `folder`. Returns `folder`.

    `manifest` lacks `schema_version`, `files` and `fingerprint`, which are added here. An existing bundle is replaced.
    Raises BundleError when manifest or files are not valid, InvalidInput when `folder` may not be replaced.
    """
    check_replaceable(folder)
    listed = {name: FileEntry(size=len(data), sha256=hashlib.sha256(data).hexdigest()) for name, data in files.items()}
    content = {
        "schema_version": schema.VERSION,
        **manifest,
        "files": {name: entry.model_dump() for name, entry in sorted(listed.items())},
    }
    content["fingerprint"] = fingerprint_of(content)
    target = Path(os.path.abspath(folder))
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as scratch:
        partial = Path(scratch) / "new"
        partial.mkdir()
        (partial / MANIFEST).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        entries = read_manifest(partial, schema).files  # validates file names before any is written to
        for name, data in files.items():
            (partial / name).write_bytes(data)
        Files(partial, entries).check()
        check_replaceable(folder)  # again: training took hours
        put_in_place(partial, target, Path(scratch) / "old")
    return folder


def check_replaceable(folder: Path) -> None:
    """Raise InvalidInput unless `folder` is absent, empty, or a bundle: a manifest, and only what it lists."""
    if not folder.is_dir():
        if os.path.lexists(folder):
            raise InvalidInput(f"{folder} is not a folder; nothing is written there")
        return
    found = {path.name for path in folder.iterdir()}
    try:
        listed = read_json(folder).get("files") if found else {}
    except BundleError:
        listed = {}
    others = sorted(found - {MANIFEST} - set(listed if isinstance(listed, dict) else ()))
    if others or (found and not listed):
        raise InvalidInput(
            f"{folder} is neither empty nor a bundle: it holds {', '.join(others[:3] or [MANIFEST])}"
            f"{f' and {len(others) - 3} more' if len(others) > 3 else ''}; only a bundle is replaced"
        )


def put_in_place(partial: Path, folder: Path, old: Path) -> None:
    """Rename `partial` to `folder`. What was there goes to `old`, and comes back when that fails or is interrupted."""
    try:
        if os.path.lexists(folder):
            folder.rename(old)
        partial.rename(folder)
    except BaseException:
        if os.path.lexists(old) and not os.path.lexists(folder):
            old.rename(folder)
        raise


def fingerprint_of(content: Mapping[str, Any]) -> str:
    """SHA-256 of the canonical JSON (sorted keys, no spaces, UTF-8) of a manifest without its fingerprint."""
    rest = {key: value for key, value in content.items() if key != "fingerprint"}
    canonical = json.dumps(rest, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def read_plain(path: Path, limit: int) -> bytes:
    """The first `limit + 1` bytes of a file. Raises BundleError for links, which could lead out of the bundle."""
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            raise BundleError(f"{path}: not a regular file")
        with path.open("rb") as file:
            return file.read(limit + 1)
    except OSError as error:
        raise BundleError(f"{path}: cannot be read: {error.strerror}") from error


def first_problem(error: ValidationError, whole: str = "manifest") -> str:
    """The first validation error of a manifest or another document, in one line."""
    problem = error.errors(include_url=False, include_context=False, include_input=False)[0]
    where = ascii(".".join(str(step)[:50] for step in problem["loc"]))[1:-1] or whole
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    return f"{where}: {problem['msg']}{more}"
