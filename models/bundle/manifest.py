"""The parts that the manifests of all kinds of bundles share: `manifest.json`.

Values only: `bundle.files` reads and writes. Units: sizes in bytes, times in seconds, fractions in [0, 1].
"""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, field_validator

SCHEMA_VERSION = 3  # of kinds that name no other

# Plain names only: no separator, no leading dot, so that no path leaves the bundle's folder.
FileName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}$")]
Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_.-]{0,63}$")]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Fraction = Annotated[float, Field(ge=0, le=1)]


class Part(BaseModel):
    """Every part of a manifest: frozen, finite numbers, no unknown field."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, strict=False)


class FileEntry(Part):
    """Size and content hash of one file of the bundle."""

    size: Annotated[int, Field(ge=0, le=1 << 30)]
    sha256: Sha256


class Interval(Part):
    """A measured fraction with its 95 % Wilson interval."""

    value: Fraction
    low: Fraction
    high: Fraction
    samples: Annotated[int, Field(ge=1)]


class Training(Part):
    """How the bundle was made, so that it can be made again."""

    command: str
    seed: int
    seconds: Annotated[float, Field(ge=0)]
    machine: str
    data: str
    versions: dict[str, str]


class BundleManifest(Part):
    """The fields that every `manifest.json` has. VERSION: the `schema_version` of a kind."""

    VERSION: ClassVar[int] = SCHEMA_VERSION
    schema_version: int
    name: Name
    licence: str
    training: Training
    scores: dict[str, Interval]
    files: dict[FileName, FileEntry]
    fingerprint: Sha256

    @field_validator("schema_version")
    @classmethod
    def _version_is_known(cls, version: int) -> int:
        if version != cls.VERSION:
            raise ValueError(f"expected {cls.VERSION}")
        return version
