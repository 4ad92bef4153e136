"""Signatures of bundles, as `minisign -Sm manifest.json` makes them: the manifest holds the hash of every other file.

manifest.json.minisig    untrusted comment, Ed25519 over BLAKE2b-512 of the manifest ("ED"), trusted comment and its
                         own signature
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from isthmus.models.bundle.files import MANIFEST, MAX_MANIFEST_BYTES, read_plain
from isthmus.models.errors import BundleError, InvalidInput

MAX_SIGNATURE_BYTES = 4096
KEY_TEXT = re.compile(r"RW[A-Za-z0-9+/]{54}")  # 42 bytes in base64, the first two "Ed"
TRUSTED = b"trusted comment: "


@dataclass(frozen=True, slots=True)
class PublicKey:
    """Of minisign: its number, which signatures name, and the key."""

    number: bytes
    key: Ed25519PublicKey


def read_public_key(text: str) -> PublicKey:
    """A minisign key: its text (RW…), or the file that holds it. Raises InvalidInput."""
    try:
        held = text if KEY_TEXT.fullmatch(text) else read_first(Path(text))
    except (OSError, ValueError) as error:
        raise InvalidInput(f"{text[:60]}: neither a minisign key (RW…) nor a file that holds one") from error
    found = KEY_TEXT.search(held)
    if found is None:
        raise InvalidInput(f"{text[:60]}: holds no minisign key (RW…)")
    raw = base64.b64decode(found[0])
    return PublicKey(raw[2:10], Ed25519PublicKey.from_public_bytes(raw[10:]))


def read_first(path: Path) -> str:
    with path.open("rb") as file:
        return file.read(MAX_SIGNATURE_BYTES).decode("ascii", "replace")


def check_signature(folder: Path, key: str, fingerprint: str) -> None:
    """Raises BundleError unless `key` has signed the bundle of this fingerprint; InvalidInput for no key."""
    if signed_fingerprint(folder, read_public_key(key)) != fingerprint:
        raise BundleError(f"{folder}: the signature is of another bundle: one of them has just been replaced")


def signed_fingerprint(folder: Path, public: PublicKey) -> str:
    """The fingerprint in the manifest that `public` has signed. Raises BundleError for any other."""
    path = folder / f"{MANIFEST}.minisig"
    manifest = read_plain(folder / MANIFEST, MAX_MANIFEST_BYTES)
    if not path.exists():
        raise BundleError(f"{folder}: is not signed, there is no {path.name}")
    lines = read_plain(path, MAX_SIGNATURE_BYTES).split(b"\n")
    if len(lines) < 4 or not lines[2].startswith(TRUSTED):
        raise BundleError(f"{path}: is no signature of minisign")
    raw, signed_comment = decoded(path, lines[1], 74), decoded(path, lines[3], 64)
    if raw[:2] != b"ED":
        raise BundleError(f"{path}: is of the old kind, sign with minisign 0.11 or newer")
    if raw[2:10] != public.number:
        raise BundleError(f"{path}: is of another key, {raw[2:10][::-1].hex().upper()}")
    try:
        public.key.verify(raw[10:], hashlib.blake2b(manifest).digest())
        public.key.verify(signed_comment, raw[10:] + lines[2].removeprefix(TRUSTED))
    except InvalidSignature as error:
        raise BundleError(f"{path}: is not of this manifest: one of them was changed") from error
    return str(json.loads(manifest)["fingerprint"])


def decoded(path: Path, line: bytes, size: int) -> bytes:
    """Raises BundleError unless a line is base64 of `size` bytes."""
    try:
        raw = base64.b64decode(line.strip(), validate=True)
    except binascii.Error as error:
        raise BundleError(f"{path}: is no signature of minisign") from error
    if len(raw) != size:
        raise BundleError(f"{path}: is no signature of minisign")
    return raw
