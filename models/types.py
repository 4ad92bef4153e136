"""Frozen values that flow between the rooms. No behaviour beyond what their fields imply."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from models.language.session import ModelInfo


class Codec(IntEnum):
    """What a payload is. The numbers are on the wire."""

    FACTORIZED = 1  # integers of a bottleneck, rANS under the bundle's integer tables
    IMAGE = 2  # a whole JPEG, PNG or WebP file


@dataclass(frozen=True, slots=True)
class Payload:
    """What crosses the bridge for one input. `rate` indexes the bundle's rates; 0 for a whole image."""

    codec: Codec
    rate: int
    data: bytes


@dataclass(frozen=True, slots=True)
class CloudRequest:
    """One input for the cloud. `budget_s` is the time the device will still wait, counted from sending."""

    request_id: int
    fingerprint: bytes
    budget_s: float
    payload: Payload


@dataclass(frozen=True, slots=True)
class CloudAnswer:
    """Class probabilities and what the cloud spent on them, in seconds."""

    probabilities: tuple[float, ...]
    queue_s: float
    compute_s: float


@dataclass(frozen=True, slots=True)
class BundleInfo:
    """What a service says of a bundle it holds. `fingerprint` is the whole SHA-256, 32 bytes."""

    fingerprint: bytes
    name: str
    task: str
    labels: int
    rates: int


@dataclass(frozen=True, slots=True)
class ServiceInfo:
    """A service's description of itself."""

    version: str
    wire_version: int
    bundles: tuple[BundleInfo, ...]
    models: tuple[ModelInfo, ...] = ()
