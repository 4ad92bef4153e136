"""What a bundle says of itself: the schema of `manifest.json`, version 3.

Values only: reading files is `bundle`'s work. Units: sizes in pixels and bytes, times in seconds, fractions in [0, 1].
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from isthmus.models.bundle.manifest import BundleManifest, FileEntry, FileName, Fraction, Name, Part

Precision = Literal["fp32", "int8"]

Side = Annotated[int, Field(ge=1, le=4096)]
Channels = Annotated[int, Field(ge=1, le=4096)]
Shape = tuple[Channels, Side, Side]  # channels, height, width


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


class TapArchitecture(Part):
    """A bottleneck's size. `after` counts the segments run before it; 0 encodes the image itself.

    `blocks`: behind an image, how many of the backbone's first blocks the encoder repeats; else 0. `rejoin`: the
    backbone's block that takes the decoded features, from a decoder of dense convolutions; 0 for the first one behind
    the last segment, from a decoder of depthwise ones. `own_tail`: from that block on, decoded features have weights of
    their own (its first task alone; others have their heads).
    `widths`: the shares of the encoder's channels that a request may choose, narrowest first, the last 1.
    """

    after: Annotated[int, Field(ge=0, le=8)]
    blocks: Annotated[int, Field(ge=0, le=1000)] = 0
    rejoin: Annotated[int, Field(ge=0, le=1000)] = 0
    own_tail: bool = False
    latent_channels: Channels
    decoder_channels: Channels
    rates: Annotated[int, Field(ge=1, le=64)]
    widths: Annotated[tuple[Annotated[float, Field(gt=0, le=1)], ...], Field(min_length=1, max_length=8)] = (1.0,)

    @field_validator("widths")
    @classmethod
    def _widths_rise(cls, widths: tuple[float, ...]) -> tuple[float, ...]:
        if list(widths) != sorted(set(widths)) or widths[-1] != 1:
            raise ValueError(f"widths {widths} must rise from each to the next and end with 1")
        return widths

    @model_validator(mode="after")
    def _whole_image_or_features(self) -> TapArchitecture:
        if (self.after == 0) != (self.blocks > 0):
            raise ValueError("blocks must be above 0 for a tap behind the image, and 0 for any other")
        if self.after and self.widths != (1.0,):
            raise ValueError("only a tap behind the image has several widths")
        return self


ExitBlocks = Annotated[tuple[Annotated[int, Field(ge=1, le=1000)], ...], Field(min_length=1, max_length=64)]


class Architecture(Part):
    """Arguments of the builder in `vision.catalog`: backbone, where it is cut, bottlenecks, classes of each task.

    `exit_blocks`: for each cut the later blocks of the backbone that its exit is made of; none where exits are heads.
    """

    builder: Name
    backbone: Name
    classes: Annotated[tuple[Annotated[int, Field(ge=2, le=100_000)], ...], Field(min_length=1, max_length=8)]
    cuts: Annotated[tuple[Annotated[int, Field(ge=1, le=1000)], ...], Field(min_length=1, max_length=8)]
    taps: Annotated[tuple[TapArchitecture, ...], Field(min_length=1, max_length=8)]
    exit_blocks: Annotated[tuple[ExitBlocks, ...], Field(min_length=1, max_length=8)] | None = None

    @field_validator("cuts")
    @classmethod
    def _cuts_rise(cls, cuts: tuple[int, ...]) -> tuple[int, ...]:
        if list(cuts) != sorted(set(cuts)):
            raise ValueError(f"cuts {cuts} must rise from each to the next")
        return cuts

    @model_validator(mode="after")
    def _taps_rejoin_before_the_tail(self) -> Architecture:
        for tap in self.taps:
            if tap.rejoin > self.cuts[-1]:
                raise ValueError(f"a tap rejoins at block {tap.rejoin}, the tail starts at {self.cuts[-1]}")
        return self

    @model_validator(mode="after")
    def _exits_go_on_behind_their_cuts(self) -> Architecture:
        if self.exit_blocks is None:
            return self
        if len(self.exit_blocks) != len(self.cuts):
            raise ValueError(f"exit_blocks has {len(self.exit_blocks)} exits for {len(self.cuts)} cuts")
        for cut, blocks in zip(self.cuts, self.exit_blocks, strict=True):
            if blocks[0] < cut or list(blocks) != sorted(set(blocks)):
                raise ValueError(f"exit_blocks {blocks} must rise, from the cut at {cut} on")
        return self


class Graphs(Part):
    """What the cloud runs of a network whose code it does not have: ONNX for any batch, from each input to logits."""

    image: FileName
    taps: Annotated[tuple[FileName, ...], Field(min_length=1, max_length=8)]  # latent_BCHW, rate_B


class Task(Part):
    """One question that the cloud answers. Exits answer the first task alone."""

    name: Name
    labels: Annotated[tuple[str, ...], Field(min_length=2, max_length=100_000)]


class Segment(Part):
    """A run of the head's blocks: features of `input` -> features of `output` and logits of one exit."""

    input: Shape
    output: Shape
    macs: Annotated[int, Field(ge=0)]


class Exit(Part):
    """An early exit after the segment of its index, measured on the calibration part as if every input left there."""

    name: Name
    accuracy: Fraction
    agreement: Fraction  # with the cloud model


class Rate(Part):
    """One operating point of a bottleneck at one width, measured on the calibration part for the first task."""

    mean_bytes: Annotated[float, Field(ge=0)]  # entropy-coded bytes an input
    max_bytes: Annotated[int, Field(ge=0)]
    accuracy: Fraction
    agreement: Fraction


class Width(Part):
    """What a width of the encoder costs, and every rate as this width fills it."""

    width: Annotated[float, Field(gt=0, le=1)]
    encoder_macs: Annotated[int, Field(ge=0)]
    rates: Annotated[tuple[Rate, ...], Field(min_length=1, max_length=64)]


class Tap(Part):
    """A narrow place: encoder as ONNX, told the width if there are several; integer tables; the cap on a payload."""

    name: Name
    encoder: FileName
    tables: FileName
    latent: Shape
    tail_macs: Annotated[int, Field(ge=0)]  # decoder and tail, first task
    max_payload_bytes: Annotated[int, Field(ge=16, le=1 << 20)]
    widths: Annotated[tuple[Width, ...], Field(min_length=1, max_length=8)]


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


class Head(Part):
    """All segments at one precision, an ONNX graph each, their exits, and when to trust those."""

    files: Annotated[tuple[FileName, ...], Field(min_length=1, max_length=8)]
    exits: Annotated[tuple[Exit, ...], Field(min_length=1, max_length=8)]
    thresholds: tuple[Threshold, ...]


class Manifest(BundleManifest):
    """The whole of `manifest.json`."""

    tasks: Annotated[tuple[Task, ...], Field(min_length=1, max_length=8)]
    preprocessing: Preprocessing
    architecture: Architecture
    weights: FileName | None = None  # of what the architecture's builder builds; else there are
    graphs: Graphs | None = None
    segments: Annotated[tuple[Segment, ...], Field(min_length=1, max_length=8)]
    heads: dict[Precision, Head]  # fp32 is never absent; figures of taps are those behind it
    taps: Annotated[tuple[Tap, ...], Field(min_length=1, max_length=8)]
    tail_macs: Annotated[int, Field(ge=0)]  # behind the last segment, first task
    units: dict[str, str]

    @field_validator("files")
    @classmethod
    def _few_files(cls, files: dict[str, FileEntry]) -> dict[str, FileEntry]:
        if len(files) > 100:
            raise ValueError(f"{len(files)} files, at most 100 are allowed")
        return files

    @model_validator(mode="after")
    def _parts_agree(self) -> Manifest:
        """Shapes, counts and file names must fit each other before anything is loaded."""
        if (self.weights is None) == (self.graphs is None):
            raise ValueError("there must be either weights or graphs")
        files = [self.weights] if self.weights else []
        if self.graphs:
            files += [self.graphs.image, *self.graphs.taps]
            if len(self.graphs.taps) != len(self.taps) or len(self.tasks) > 1:
                raise ValueError("graphs must have one for each tap, and answer one task")
        files += [name for head in self.heads.values() for name in head.files]
        files += [name for tap in self.taps for name in (tap.encoder, tap.tables)]
        if missing := sorted(set(files) - set(self.files)):
            raise ValueError(f"files does not list {', '.join(missing)}")
        if "fp32" not in self.heads:
            raise ValueError("heads must have fp32")
        for precision, head in self.heads.items():
            if not len(self.segments) == len(head.files) == len(head.exits) == len(self.architecture.cuts):
                raise ValueError(f"segments, architecture.cuts, files and exits of {precision} must be of one length")
            if [exit_.name for exit_ in head.exits] != [exit_.name for exit_ in self.heads["fp32"].exits]:
                raise ValueError(f"exits of {precision} must be named like those of fp32")
        if self.segments[0].input != (3, *self.preprocessing.crop):
            raise ValueError(
                f"segment 0 takes {self.segments[0].input}, the crop gives {(3, *self.preprocessing.crop)}"
            )
        for index, (before, after) in enumerate(zip(self.segments, self.segments[1:], strict=False)):
            if before.output != after.input:
                raise ValueError(f"segment {index} gives {before.output}, segment {index + 1} takes {after.input}")
        if self.architecture.classes != tuple(len(task.labels) for task in self.tasks):
            raise ValueError(f"architecture.classes is {self.architecture.classes}, tasks have other label counts")
        for what, names in (("tasks", [t.name for t in self.tasks]), ("taps", [t.name for t in self.taps])):
            if len(set(names)) < len(names):
                raise ValueError(f"{what} must have different names")
        if len(self.taps) != len(self.architecture.taps):
            raise ValueError("taps and architecture.taps must be of one length")
        for tap, built in zip(self.taps, self.architecture.taps, strict=True):
            self._tap_fits(tap, built)
        return self

    def _tap_fits(self, tap: Tap, built: TapArchitecture) -> None:
        if built.after > len(self.segments):
            raise ValueError(f"tap {tap.name} comes after {built.after} segments, there are {len(self.segments)}")
        if built.latent_channels != tap.latent[0]:
            raise ValueError(f"tap {tap.name}: architecture has {built.latent_channels} latent channels")
        if built.widths != tuple(width.width for width in tap.widths):
            raise ValueError(f"tap {tap.name}: architecture has widths {built.widths}")
        if any(len(width.rates) != built.rates for width in tap.widths):
            raise ValueError(f"tap {tap.name}: architecture has {built.rates} rates")
