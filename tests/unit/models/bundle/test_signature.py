from __future__ import annotations

import base64
import hashlib
import json
import shutil
import subprocess
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from isthmus.edge_agent import EdgeAgent, EdgeConfig
from isthmus.models.bundle.signature import check_signature, read_public_key, signed_fingerprint
from isthmus.models.errors import BundleError, InvalidInput

ROOT = Path(__file__).resolve().parents[4]
NUMBER = b"number08"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(ROOT / "models/zoo/fashion", tmp_path / "bundle"))


@pytest.fixture(scope="module")
def key() -> Ed25519PrivateKey:
    return Ed25519PrivateKey.generate()


def public(key: Ed25519PrivateKey) -> str:
    return base64.b64encode(b"Ed" + NUMBER + key.public_key().public_bytes_raw()).decode()


def sign(folder: Path, key: Ed25519PrivateKey, kind: bytes = b"ED", number: bytes = NUMBER) -> list[bytes]:
    """Writes what minisign would, and returns its lines."""
    manifest = (folder / "manifest.json").read_bytes()
    signature = key.sign(hashlib.blake2b(manifest).digest() if kind == b"ED" else manifest)
    comment = b"timestamp:1"
    lines = [
        b"untrusted comment: x",
        base64.b64encode(kind + number + signature),
        b"trusted comment: " + comment,
        base64.b64encode(key.sign(signature + comment)),
        b"",
    ]
    (folder / "manifest.json.minisig").write_bytes(b"\n".join(lines))
    return lines


def test_an_agent_that_requires_a_signature_opens_a_signed_bundle_only(folder: Path, key: Ed25519PrivateKey) -> None:
    config = EdgeConfig(bundle=folder, require_signature=public(key), ledger=folder.parent / "ledger.db")
    with pytest.raises(BundleError, match=r"is not signed, there is no manifest\.json\.minisig"):
        EdgeAgent(config)
    sign(folder, key)
    EdgeAgent(config).close()
    sign(folder, Ed25519PrivateKey.generate())
    with pytest.raises(BundleError, match="is not of this manifest"):
        EdgeAgent(config)


def test_whatever_is_changed_the_signature_does_not_hold(folder: Path, key: Ed25519PrivateKey) -> None:
    known, path = read_public_key(public(key)), folder / "manifest.json.minisig"
    lines = sign(folder, key)
    fingerprint = json.loads((folder / "manifest.json").read_text())["fingerprint"]
    assert signed_fingerprint(folder, known) == fingerprint
    for number in (1, 2, 3):
        for place in range(20 if number == 2 else 0, len(lines[number]), 7):
            changed = bytearray(lines[number])
            changed[place] ^= 1
            path.write_bytes(b"\n".join([*lines[:number], bytes(changed), *lines[number + 1 :]]))
            with pytest.raises(BundleError):
                signed_fingerprint(folder, known)
    path.write_bytes(b"\n".join(lines))
    with (folder / "manifest.json").open("ab") as file:
        file.write(b" ")
    with pytest.raises(BundleError, match="is not of this manifest"):
        signed_fingerprint(folder, known)


def test_other_keys_and_kinds_are_named(folder: Path, key: Ed25519PrivateKey) -> None:
    known = read_public_key(public(key))
    for change, words in (
        ({"number": b"another8"}, "is of another key"),
        ({"kind": b"Ed"}, "of the old kind"),
    ):
        sign(folder, key, **change)
        with pytest.raises(BundleError, match=words):
            signed_fingerprint(folder, known)
    for junk in (b"", b"\n\n\n\n", b"a\nb\ntrusted comment: c\nd", bytes(5000)):
        (folder / "manifest.json.minisig").write_bytes(junk)
        with pytest.raises(BundleError, match="is no signature of minisign"):
            signed_fingerprint(folder, known)
    (folder / "manifest.json.minisig").unlink()
    (folder / "manifest.json.minisig").symlink_to("/etc/hostname")
    with pytest.raises(BundleError, match="not a regular file"):
        signed_fingerprint(folder, known)


def test_a_signature_of_another_bundle_does_not_hold(folder: Path, key: Ed25519PrivateKey) -> None:
    sign(folder, key)
    with pytest.raises(BundleError, match="is of another bundle"):
        check_signature(folder, public(key), "0" * 64)


@pytest.mark.parametrize("text", ["", "RW", "/nowhere", "RW" + "!" * 54])
def test_what_is_no_key_is_said_so(text: str) -> None:
    with pytest.raises(InvalidInput, match="minisign key"):
        read_public_key(text)


@pytest.mark.skipif(shutil.which("minisign") is None, reason="minisign is not installed")
def test_minisign_itself_signs_what_is_accepted(folder: Path) -> None:
    keys = [str(folder.parent / name) for name in ("k.pub", "k.sec")]
    subprocess.run(["minisign", "-G", "-W", "-p", keys[0], "-s", keys[1]], check=True, capture_output=True)
    subprocess.run(["minisign", "-Sm", folder / "manifest.json", "-s", keys[1]], check=True, capture_output=True)
    assert signed_fingerprint(folder, read_public_key(keys[0]))
