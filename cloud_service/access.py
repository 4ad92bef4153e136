"""Who may use the service, and how much: device names, tokens, revocation and quotas, from one file that may change.

    certificate   checked by TLS; a SPIFFE ID spiffe://DOMAIN/device/NAME among its names is the device's
    token         `authorization: Bearer …` of a call; the file holds SHA-256 digests only

Nothing that a device says of itself counts. Knows nothing about gRPC.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from pydantic.dataclasses import dataclass as checked

from isthmus.cloud_service.quotas import Quota, Quotas, Usage
from isthmus.models.errors import InvalidInput, Refused, Unauthenticated
from isthmus.models.settings import Settings

MAX_FILE_BYTES = 32 << 20  # 200,000 devices
MAX_TOKEN_CHARACTERS = 512
EVERYONE = "*"  # in `quotas`: devices without a quota of their own
NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
DIGEST = r"^[0-9a-f]{64}$"
SPIFFE = re.compile(r"spiffe://[a-z0-9._-]{1,255}/device/([A-Za-z0-9][A-Za-z0-9._-]{0,63})")
NO_QUOTA = Quota()

DeviceName = Annotated[str, Field(pattern=NAME)]
Digest = Annotated[str, Field(pattern=DIGEST)]


@checked(frozen=True)
class AccessFile(Settings):
    """What the file holds. `revoked`: names of devices, and SHA-256 digests of certificates (of their DER form)."""

    tokens: dict[DeviceName, tuple[Digest, ...]] = Field(default_factory=dict)
    revoked: tuple[DeviceName, ...] = ()
    quotas: dict[DeviceName | Annotated[str, Field(pattern=r"^\*$")], Quota] = Field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Device:
    """Who makes a call. `peer`: of whom takes turns with others. `name`: empty where nothing proves one.

    `proof`: the digest of its certificate or token; empty for none.
    """

    peer: str
    name: str = ""
    proof: str = ""


class Access:
    """Used on the event loop's thread; reading a large file, `read_access`, may run in another one."""

    def __init__(self, path: Path | None = None, *, by_certificate: bool = False) -> None:
        """`by_certificate`: TLS has checked a certificate of each device. Raises InvalidInput for the file."""
        self.path = path
        self._by_certificate = by_certificate
        self._quotas = Quotas()
        self.use(AccessFile() if path is None else read_access(path))

    @property
    def needed(self) -> bool:
        """Whether a device must show who it is."""
        return self._by_certificate or self.path is not None

    def use(self, file: AccessFile) -> None:
        """From now on this content holds."""
        self._file, self._revoked = file, frozenset(file.revoked)
        self._names = {digest: name for name, digests in file.tokens.items() for digest in digests}

    def device(self, connection: str, proven: Mapping[str, Sequence[bytes]], authorization: str) -> Device:
        """The device of a call over `connection`: what TLS has proven (gRPC's auth context), and its token."""
        if self._by_certificate:
            return certified(connection, proven)
        token = authorization.removeprefix("Bearer ").strip()
        if self.path is None or token == authorization or not 0 < len(token) <= MAX_TOKEN_CHARACTERS:
            return Device(connection)
        digest = token_digest(token)
        name = self._names.get(digest, "")  # of a digest: how long it takes says nothing about tokens
        return Device(f"device {name}" if name else connection, name, digest)

    def refusal(self, device: Device) -> tuple[Refused, str] | None:
        """Why a device may not use the service, and the reason to count; None if it may."""
        if not self.needed:
            return None
        if not device.proof:
            return Unauthenticated("this service asks for a token: --token-file"), "no_token"
        if device.name in self._revoked or device.proof in self._revoked:
            return Refused("the access of this device was revoked"), "revoked"
        if not self._by_certificate and device.proof not in self._names:
            return Unauthenticated("this service does not know the token"), "wrong_token"
        return None

    def spend(self, device: Device, usage: Usage, *, used: bool = False) -> None:
        """Count what a message uses, or has `used`. Raises Overloaded, with when to come again, beyond the quota."""
        if self._file.quotas:
            self._quotas.take(device.peer, self.quota(device), usage, time.monotonic(), used=used)

    def quota(self, device: Device) -> Quota:
        """The device's own, or everyone's."""
        quotas = self._file.quotas
        return quotas.get(device.name) or quotas.get(EVERYONE, NO_QUOTA)


def certified(connection: str, proven: Mapping[str, Sequence[bytes]]) -> Device:
    """The device of a certificate that TLS has checked. A name that only looks like a SPIFFE ID proves nothing."""
    pem = b"".join(proven.get("x509_pem_cert", ()))
    proof = certificate_digest(pem)
    ids = [value.decode(errors="replace") for value in proven.get("peer_spiffe_id", ())]
    if len(ids) == 1 and (found := SPIFFE.fullmatch(ids[0])):
        return Device(f"device {found[1]}", found[1], proof)
    names = proven.get("x509_subject_alternative_name") or proven.get("x509_common_name") or ()
    return Device(b", ".join(names).decode(errors="replace").replace("device ", "device_") or connection, "", proof)


def certificate_digest(pem: bytes) -> str:
    """SHA-256 of the first certificate's DER form; empty without one."""
    body = pem.partition(b"-----BEGIN CERTIFICATE-----")[2].partition(b"-----END")[0]
    try:
        return hashlib.sha256(base64.b64decode(body)).hexdigest() if body else ""
    except binascii.Error:
        return ""


def token_digest(token: str) -> str:
    """What is stored of a token: 256 random bits need no salt and no slow function."""
    return hashlib.sha256(token.encode()).hexdigest()


def read_access(path: Path) -> AccessFile:
    """Raises InvalidInput, one line, for a file that cannot be read or used."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise InvalidInput(f"{path}: cannot be read: {(error.strerror or 'no reason given').lower()}") from error
    if len(data) > MAX_FILE_BYTES:
        raise InvalidInput(f"{path}: larger than {MAX_FILE_BYTES} bytes")
    try:
        content: Any = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"{path}: is no JSON, expected what `cloud-service keys` writes") from error
    if not isinstance(content, dict):
        raise InvalidInput(f"{path}: is no JSON object, expected what `cloud-service keys` writes")
    try:
        return AccessFile(**content)
    except InvalidInput as error:
        raise InvalidInput(f"{path}: {error}") from error
