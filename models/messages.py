"""Frozen values that flow between the rooms. No behaviour beyond what their fields imply."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from isthmus.models.language.session import ModelInfo


class Codec(IntEnum):
    """What a payload is. The numbers are on the wire."""

    BOTTLENECK = 1  # integers of a tap, rANS under the bundle's integer tables
    IMAGE = 2  # a whole JPEG, PNG or WebP file


@dataclass(frozen=True, slots=True)
class Payload:
    """What crosses the bridge for one input. `tap` indexes the bundle's taps, `rate` the tap's; 0 for a whole image."""

    codec: Codec
    tap: int
    rate: int
    data: bytes


@dataclass(frozen=True, slots=True)
class CloudRequest:
    """One input for the cloud. `budget_s` is the time the device will still wait, counted from sending.

    `tasks` index the bundle's tasks, rising: the answers that are wanted.
    """

    request_id: int
    fingerprint: bytes
    budget_s: float
    payload: Payload
    tasks: tuple[int, ...] = (0,)


@dataclass(frozen=True, slots=True)
class CloudAnswer:
    """Class probabilities of each task asked for, in the bundle's order, and what the cloud spent, in seconds."""

    probabilities: tuple[tuple[float, ...], ...]
    queue_s: float
    compute_s: float


@dataclass(frozen=True, slots=True)
class TaskInfo:
    """A question that a bundle answers, and the number of its classes."""

    name: str
    labels: int


@dataclass(frozen=True, slots=True)
class TapInfo:
    """A bottleneck of a bundle, and the number of its rates."""

    name: str
    rates: int


@dataclass(frozen=True, slots=True)
class BundleInfo:
    """What a service says of a bundle it holds. `fingerprint` is the whole SHA-256, 32 bytes."""

    fingerprint: bytes
    name: str
    tasks: tuple[TaskInfo, ...]
    taps: tuple[TapInfo, ...]


@dataclass(frozen=True, slots=True)
class ServiceInfo:
    """A service's description of itself."""

    version: str
    wire_version: int
    bundles: tuple[BundleInfo, ...]
    models: tuple[ModelInfo, ...] = ()
