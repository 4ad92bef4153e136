"""The folder of `cloud-service keys`. Files are for their owner alone, and are replaced whole or not at all.

ca.pem  ca.key                     the authority; its key is needed here only, never by a service or a device
service.pem  service.key           of the service
devices/NAME.pem  devices/NAME.key of each device
access.json                        digests of tokens, quotas, revoked devices (cloud_service.access)
issued.jsonl                       a line for each certificate that was made, by which it can be revoked
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import json
import os
import re
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes

from isthmus.cloud_service.access import NAME, AccessFile, read_access, token_digest
from isthmus.cloud_service.keys.authority import Pair, hosts_of, issue_device, issue_service, load_pair, new_authority
from isthmus.cloud_service.quotas import Quota
from isthmus.models.errors import InvalidInput
from isthmus.protos.certificates import load_certificates, read_pem, read_pems

LIVE_TOKENS = 2  # of a device: the former one is good until the device has the new one
TOKEN_BYTES = 32


class KeyFolder:
    """Every method that changes something holds a lock, so that two commands do not undo each other's work."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def access(self) -> Path:
        return self.path / "access.json"

    def init(self, hosts: Sequence[str], days: int) -> list[Path]:
        """An authority, a service's certificate and a file of devices, where they are missing. Returns what is new."""
        with self._locked(create=True):
            made: list[Path] = []
            if not (self.path / "ca.pem").exists():
                made += self._write_pair("ca", new_authority())
            if not (self.path / "service.pem").exists():
                made += self._service(hosts, days)
            if not self.access.exists():
                self._write_access(AccessFile())
                made.append(self.access)
            return made

    def service(self, hosts: Sequence[str], days: int) -> list[Path]:
        """A new certificate of the service."""
        with self._locked():
            return self._service(hosts, days)

    def device(self, name: str, days: int) -> list[Path]:
        """A new certificate of a device. Raises InvalidInput for a name that cannot be one."""
        check_name(name)
        with self._locked():
            return self._device(name, days)

    def renew(self, within_days: int, days: int) -> list[Path]:
        """New certificates, with new keys, for those that expire within so many days and are not revoked."""
        limit = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=within_days)
        with self._locked():
            made: list[Path] = []
            revoked = self._read_access().revoked
            for name, certificate in self.certificates():
                if certificate.not_valid_after_utc > limit or name == "ca":
                    continue
                if name in revoked or certificate.fingerprint(hashes.SHA256()).hex() in revoked:
                    continue
                hosts = hosts_of(certificate) if name == "service" else []
                made += self._service(hosts, days) if hosts else self._device(name, days)
            return made

    def token(self, name: str) -> str:
        """A new token of a device, of which only a digest is kept. Of its former ones the newest stays good."""
        check_name(name)
        with self._locked():
            token = "isthmus_" + secrets.token_urlsafe(TOKEN_BYTES)
            file = self._read_access()
            live = (*file.tokens.get(name, ()), token_digest(token))[-LIVE_TOKENS:]
            self._write_access(replace(file, tokens={**file.tokens, name: live}))
            return token

    def revoke(self, name: str) -> int:
        """Revoke what was made for a device, or its name if nothing was. Returns how many certificates and tokens."""
        check_name(name)
        with self._locked():
            file = self._read_access()
            now = datetime.datetime.now(datetime.UTC).isoformat()
            issued = [line for line in self._issued() if line["name"] == name and line["not_after"] > now]
            digests = [line["digest"] for line in issued]
            count = len(digests) + len(file.tokens.get(name, ()))
            revoked = dict.fromkeys((*file.revoked, *(digests if count else [name])))
            tokens = {each: live for each, live in file.tokens.items() if each != name}
            self._write_access(replace(file, revoked=tuple(revoked), tokens=tokens))
            return count

    def limit(self, name: str, quota: Quota) -> None:
        """Set the quota of a device, or of everyone (`*`); an empty one removes it."""
        if name != "*":
            check_name(name)
        with self._locked():
            file = self._read_access()
            quotas = {each: held for each, held in file.quotas.items() if each != name}
            self._write_access(replace(file, quotas=quotas | ({name: quota} if quota != Quota() else {})))

    def certificates(self) -> Iterator[tuple[str, x509.Certificate]]:
        """Name and certificate of the authority, the service and every device."""
        for path in (self.path / "ca.pem", self.path / "service.pem", *sorted(self.path.glob("devices/*.pem"))):
            yield path.stem, load_certificates(path, read_pem(path))[0]

    def _service(self, hosts: Sequence[str], days: int) -> list[Path]:
        return self._write_pair("service", issue_service(self._authority(), hosts, days))

    def _device(self, name: str, days: int) -> list[Path]:
        pair = issue_device(self._authority(), name, days)
        (self.path / "devices").mkdir(mode=0o700, exist_ok=True)
        line = {"name": name, "digest": pair.digest, "not_after": pair.certificate.not_valid_after_utc.isoformat()}
        descriptor = os.open(self.path / "issued.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(json.dumps(line).encode() + b"\n")
        return self._write_pair(f"devices/{name}", pair)

    def _authority(self) -> Pair:
        certificate, key = self.path / "ca.pem", self.path / "ca.key"
        read_pems(certificate, key, None)
        return load_pair(read_pem(certificate), read_pem(key))

    def _write_pair(self, name: str, pair: Pair) -> list[Path]:
        """Key first: a reader that sees only one of them new finds that they do not fit, and waits."""
        key, certificate = self.path / f"{name}.key", self.path / f"{name}.pem"
        write_whole(key, pair.key_pem)
        write_whole(certificate, pair.certificate_pem)
        return [certificate, key]

    def _issued(self) -> Iterator[dict[str, str]]:
        with contextlib.suppress(FileNotFoundError), (self.path / "issued.jsonl").open("rb") as file:
            yield from map(json.loads, file)

    def _read_access(self) -> AccessFile:
        return read_access(self.access)

    def _write_access(self, file: AccessFile) -> None:
        content: dict[str, Any] = asdict(file)
        content["quotas"] = {
            name: {key: value for key, value in quota.items() if value is not None}
            for name, quota in content["quotas"].items()
        }
        write_whole(self.access, json.dumps(content, indent=1).encode() + b"\n")

    @contextlib.contextmanager
    def _locked(self, *, create: bool = False) -> Iterator[None]:
        """Raises InvalidInput where the folder holds no authority, unless it is to be made."""
        try:
            if create:
                self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            elif not (self.path / "ca.pem").is_file():
                raise InvalidInput(f"{self.path} holds no authority: `cloud-service keys init` makes one")
            descriptor = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                yield
            finally:
                os.close(descriptor)
        except OSError as error:
            raise InvalidInput(f"{error.filename or self.path}: {(error.strerror or 'failed').lower()}") from error


def check_name(name: str) -> None:
    """Raises InvalidInput unless a device may be called so."""
    if not re.fullmatch(NAME.strip("^$"), name):
        raise InvalidInput(f"{name[:70]!a} is no name of a device: 1 to 64 letters, digits, dots, dashes, underscores")


def write_whole(path: Path, data: bytes) -> None:
    """Replace a file, or a link in its place, by one that only its owner may read."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
