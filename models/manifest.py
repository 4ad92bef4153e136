"""What a bundle says of itself: the schema of `manifest.json`, version 1.

Values only: reading files is `bundle`'s work. Units: sizes in pixels and bytes, times in seconds, fractions in [0, 1].
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, field_validator, model_validator

SCHEMA_VERSION = 1

# Plain names alone: no separator, no leading dot, so that no path leaves the bundle's folder.
FileName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}$")]
Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_.-]{0,63}$")]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Fraction = Annotated[float, Field(ge=0, le=1)]
Side = Annotated[int, Field(ge=1, le=4096)]
Channels = Annotated[int, Field(ge=1, le=4096)]
Shape = tuple[Channels, Side, Side]  # channels, height, width


class Part(BaseModel):
    """Every part of a manifest: frozen, finite numbers, no unknown field."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, strict=False)


class FileEntry(Part):
    """Size and content hash of one file of the bundle."""

    size: Annotated[int, Field(ge=0, le=1 << 30)]
    sha256: Sha256


class Preprocessing(Part):
    """Photo -> network input: RGB, shorter side to `resize` (bilinear), centre crop, (x / 255 - mean) / deviation."""

    resize: Side
    crop: tuple[Side, Side]  # height, width
    mean: tuple[float, float, float]
    deviation: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]]

    @model_validator(mode="after")
    def _crop_fits(self) -> Preprocessing:
        if max(self.crop) > self.resize:
            raise ValueError(f"crop {self.crop} is larger than resize {self.resize}")
        return self


class Architecture(Part):
    """Arguments of the builder in `models.catalog`: backbone, where it is cut, the bottleneck's size."""

    builder: Name
    backbone: Name
    classes: Annotated[int, Field(ge=2, le=100_000)]
    cuts: Annotated[tuple[Annotated[int, Field(ge=1, le=1000)], ...], Field(min_length=1, max_length=8)]
    latent_channels: Channels
    decoder_channels: Channels
    rates: Annotated[int, Field(ge=1, le=64)]

    @field_validator("cuts")
    @classmethod
    def _cuts_rise(cls, cuts: tuple[int, ...]) -> tuple[int, ...]:
        if list(cuts) != sorted(set(cuts)):
            raise ValueError(f"cuts {cuts} must rise from each to the next")
        return cuts


class Segment(Part):
    """A run of the head's blocks as ONNX: features of `input` -> features of `output` and logits of one exit."""

    file: FileName
    input: Shape
    output: Shape
    macs: Annotated[int, Field(ge=0)]


class Exit(Part):
    """An early exit after the segment of its index, measured on the calibration part as if every input left there."""

    name: Name
    accuracy: Fraction
    agreement: Fraction  # with the cloud model


class Rate(Part):
    """One operating point of the bottleneck, measured on the calibration part."""

    mean_bytes: Annotated[float, Field(ge=0)]  # entropy-coded bytes an input
    max_bytes: Annotated[int, Field(ge=0)]
    accuracy: Fraction
    agreement: Fraction


class Bottleneck(Part):
    """The narrow place: encoder as ONNX, integer tables, and the cap on what one input may cost."""

    encoder: FileName
    tables: FileName
    latent: Shape
    encoder_macs: Annotated[int, Field(ge=0)]
    max_payload_bytes: Annotated[int, Field(ge=16, le=1 << 20)]
    rates: Annotated[tuple[Rate, ...], Field(min_length=1, max_length=64)]


class Threshold(Part):
    """Exit when the confidence is at least `confidence`; certified: P(loss of accuracy > epsilon) <= delta.

    Learn-then-test (Angelopoulos et al., 2021), exact binomial, fixed sequence, on `samples` calibration inputs.
    A confidence above 1 means that no exit could be certified.
    """

    epsilon: Fraction
    delta: Fraction
    confidence: Annotated[float, Field(ge=0, le=2)]
    coverage: Fraction  # share answered on the device
    loss: Fraction  # observed on the calibration part
    samples: Annotated[int, Field(ge=1)]


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


class Manifest(Part):
    """The whole of `manifest.json`."""

    schema_version: Literal[1]
    name: Name
    task: Literal["classification"]
    labels: Annotated[tuple[str, ...], Field(min_length=2, max_length=100_000)]
    licence: str
    preprocessing: Preprocessing
    architecture: Architecture
    weights: FileName
    segments: Annotated[tuple[Segment, ...], Field(min_length=1, max_length=8)]
    exits: Annotated[tuple[Exit, ...], Field(min_length=1, max_length=8)]
    bottleneck: Bottleneck
    tail_macs: Annotated[int, Field(ge=0)]
    thresholds: tuple[Threshold, ...]
    training: Training
    scores: dict[str, Interval]
    units: dict[str, str]
    files: dict[FileName, FileEntry]
    fingerprint: Sha256

    @field_validator("files")
    @classmethod
    def _few_files(cls, files: dict[str, FileEntry]) -> dict[str, FileEntry]:
        if len(files) > 100:
            raise ValueError(f"{len(files)} files, at most 100 are allowed")
        return files

    @model_validator(mode="after")
    def _parts_agree(self) -> Manifest:
        """Shapes, counts and file names must fit each other before anything is loaded."""
        names = [self.weights, self.bottleneck.encoder, self.bottleneck.tables, *(s.file for s in self.segments)]
        if missing := sorted(set(names) - set(self.files)):
            raise ValueError(f"files does not list {', '.join(missing)}")
        if not len(self.segments) == len(self.exits) == len(self.architecture.cuts):
            raise ValueError("segments, exits and architecture.cuts must be of one length")
        if self.segments[0].input != (3, *self.preprocessing.crop):
            raise ValueError(
                f"segment 0 takes {self.segments[0].input}, the crop gives {(3, *self.preprocessing.crop)}"
            )
        for index, (before, after) in enumerate(zip(self.segments, self.segments[1:], strict=False)):
            if before.output != after.input:
                raise ValueError(f"segment {index} gives {before.output}, segment {index + 1} takes {after.input}")
        if self.architecture.rates != len(self.bottleneck.rates):
            raise ValueError("architecture.rates and bottleneck.rates disagree")
        if self.architecture.latent_channels != self.bottleneck.latent[0]:
            raise ValueError("architecture.latent_channels and bottleneck.latent disagree")
        if self.architecture.classes != len(self.labels):
            raise ValueError(f"{self.architecture.classes} classes, but {len(self.labels)} labels")
        return self
