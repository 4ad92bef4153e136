"""PEM files of TLS, read and checked before gRPC has them: what is wrong with one is said in a line that names it.

Shared by both sides. Knows nothing about channels or servers.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from isthmus.models.errors import InvalidInput

MAX_PEM_BYTES = 4 << 20  # more is another file, given by mistake; all authorities of a system take 0.3 MB

Stamp = tuple[tuple[int, int, int, int] | None, ...]


@dataclass(frozen=True, slots=True)
class Pems:
    """What gRPC gets: bytes of PEM files; `certificates` are those of `certificate`, the own one first."""

    key: bytes | None = None
    certificate: bytes | None = None
    roots: bytes | None = None
    certificates: tuple[x509.Certificate, ...] = ()

    @property
    def not_after(self) -> datetime.datetime | None:
        """When the own certificate expires, UTC."""
        return self.certificates[0].not_valid_after_utc if self.certificates else None


def read_pems(certificate: Path | None, key: Path | None, roots: Path | None) -> Pems:
    """Raises InvalidInput, one line, for a file that cannot be read or used, and a key of another certificate."""
    if (certificate is None) != (key is None):
        raise InvalidInput("a certificate and its key need each other")
    authorities = None if roots is None else read_pem(roots)
    if roots is not None and authorities is not None:
        load_certificates(roots, authorities)
    if certificate is None or key is None:
        return Pems(roots=authorities)
    pems = read_pem(key), read_pem(certificate)
    chain = load_certificates(certificate, pems[1])
    check_key(key, pems[0], certificate, chain[0])
    return Pems(*pems, authorities, chain)


def read_pem(path: Path) -> bytes:
    """The bytes of a file. Raises InvalidInput."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_PEM_BYTES + 1)
    except OSError as error:
        raise InvalidInput(f"{path}: cannot be read: {(error.strerror or 'no reason given').lower()}") from error
    if len(data) > MAX_PEM_BYTES:
        raise InvalidInput(f"{path}: larger than {MAX_PEM_BYTES} bytes, so no PEM file of TLS")
    return data


def load_certificates(path: Path, pem: bytes) -> tuple[x509.Certificate, ...]:
    """At least one. Raises InvalidInput."""
    try:
        return tuple(x509.load_pem_x509_certificates(pem))
    except (ValueError, UnsupportedAlgorithm) as error:
        raise InvalidInput(f"{path}: holds no certificate in PEM") from error


def check_key(path: Path, pem: bytes, certificate_path: Path, certificate: x509.Certificate) -> None:
    """Raises InvalidInput unless `pem` is the certificate's key."""
    try:
        key = load_pem_private_key(pem, None)
    except TypeError as error:  # as cryptography says that it needs a password
        raise InvalidInput(f"{path}: is protected by a password, expected a key without one") from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise InvalidInput(f"{path}: holds no private key in PEM") from error
    if key.public_key() != certificate.public_key():
        raise InvalidInput(f"{path}: is the key of another certificate than {certificate_path}")


def stamp(paths: Sequence[Path | None]) -> Stamp:
    """What changes when a file does: links are followed, a file that cannot be read has none."""
    found = []
    for path in paths:
        try:
            state = path.stat() if path is not None else None
        except OSError:
            state = None
        found.append(state and (state.st_dev, state.st_ino, state.st_mtime_ns, state.st_size))
    return tuple(found)


def expiry_problem(certificate: x509.Certificate) -> str | None:
    """Why a certificate is not valid now, by this machine's clock; None where it is."""
    now = datetime.datetime.now(datetime.UTC)
    clock = f"by this machine's clock, {now:%Y-%m-%d %H:%M} UTC"
    if certificate.not_valid_after_utc < now:
        return f"expired on {certificate.not_valid_after_utc:%Y-%m-%d %H:%M} UTC {clock}"
    if certificate.not_valid_before_utc > now:
        return f"is valid from {certificate.not_valid_before_utc:%Y-%m-%d %H:%M} UTC only {clock}"
    return None


def names_of(certificate: x509.Certificate) -> list[str]:
    """Names and addresses that a certificate is for: its subject alternative names."""
    try:
        found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (x509.ExtensionNotFound, ValueError):
        return []
    return [str(name.value) for name in found]
