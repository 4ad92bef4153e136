"""The schema of a vision bundle's `manifest.json`, version 4.

Values only: `bundle.files` reads and writes. Units: sizes in pixels and bytes, times in seconds, fractions in [0, 1].
"""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from isthmus.models.bundle.manifest import BundleManifest, FileEntry, FileName, Fraction, Name, Part, Sha256
from isthmus.models.vision.architecture import Architecture, Shape, Side, TapArchitecture
from isthmus.models.vision.tasks import Task

Precision = Literal["fp32", "int8"]
ImageForm = Literal["jpeg", "webp", "png"]
Promise = Literal["accuracy", "agreement"]
Among = Literal["all", "exited"]
Fit = Literal["crop", "stretch", "letterbox"]

NEVER = 2.0  # a score that no exit reaches
FEATURES = 5  # of a correctness head

DEFAULT_EPSILON = 0.005  # half a point: the loss of accuracy that a device allows its exits by default


class Preprocessing(Part):
    """Photo -> network input: RGB, scaled (bilinear) to `crop` as `fit` says, (x / 255 - mean) / deviation.

    fit: crop scales the shorter side to `resize` and takes the middle; stretch scales both sides; letterbox scales the
    longer side and fills what is left with `mean`. A photo sent whole has at most `resize` pixels on its shorter side,
    with letterbox on its longer side.
    """

    resize: Side
    crop: tuple[Side, Side]  # height, width
    mean: tuple[float, float, float]
    deviation: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]]
    fit: Annotated[Fit, Field(exclude_if=lambda fit: fit == "crop")] = "crop"  # older manifests do not have it

    @model_validator(mode="after")
    def _crop_fits(self) -> Preprocessing:
        if max(self.crop) > self.resize:
            raise ValueError(f"crop {self.crop} is larger than resize {self.resize}")
        return self


class Graphs(Part):
    """The cloud's part of a network whose code it does not have: ONNX for any batch, from each input to the outputs.

    Outputs are those of all tasks in their order, named as `tasks` says; of a single classification under any name.
    """

    image: FileName
    taps: Annotated[tuple[FileName, ...], Field(min_length=1, max_length=8)]  # latent_BCHW, rate_B


class Segment(Part):
    """Consecutive blocks of the head: features of shape `input` -> features of shape `output`, logits of one exit."""

    input: Shape
    output: Shape
    macs: Annotated[int, Field(ge=0)]


class CorrectnessHead(Part):
    """Logistic regression: the chance that an exit's answer costs nothing against the cloud's. See `exit_score`."""

    bias: float
    weights: Annotated[tuple[float, ...], Field(min_length=FEATURES, max_length=FEATURES)]


class Exit(Part):
    """An early exit after the segment of its index, measured on the calibration part as if every input took it.

    Its answer is judged by `score`, or by its highest probability where there is none. `answers` False: there is none
    after this segment, whose graph gives features only; `accuracy` and `agreement` are 0.
    """

    name: Name
    accuracy: Fraction
    agreement: Fraction  # with the cloud model
    score: CorrectnessHead | None = None
    answers: Annotated[bool, Field(exclude_if=bool)] = True


class Rate(Part):
    """One operating point of a bottleneck at one width, measured on the calibration part for the first task."""

    mean_bytes: Annotated[float, Field(ge=0)]  # entropy-coded bytes an input
    max_bytes: Annotated[int, Field(ge=0)]
    accuracy: Fraction
    agreement: Fraction


class Width(Part):
    """The cost of one width of the encoder, and every rate measured at this width."""

    width: Annotated[float, Field(gt=0, le=1)]
    encoder_macs: Annotated[int, Field(ge=0)]
    rates: Annotated[tuple[Rate, ...], Field(min_length=1, max_length=64)]


class Tap(Part):
    """A bottleneck: encoder as ONNX, with the width as an input if there are several; integer tables; payload cap."""

    name: Name
    encoder: FileName
    tables: FileName
    latent: Shape
    tail_macs: Annotated[int, Field(ge=0)]  # decoder and tail, first task
    max_payload_bytes: Annotated[int, Field(ge=16, le=1 << 20)]
    widths: Annotated[tuple[Width, ...], Field(min_length=1, max_length=8)]


class ImageWay(Part):
    """A whole photo sent as a file, shrunk to the network's `resize`, measured on the calibration part."""

    form: ImageForm
    quality: Annotated[int, Field(ge=1, le=100)]  # 100 for PNG, which is lossless
    mean_bytes: Annotated[float, Field(ge=0)]
    accuracy: Fraction
    agreement: Fraction  # with the cloud model on the photo as it is


def wilson(fraction: float, samples: int, z: float = 1.96) -> tuple[float, float]:
    """The Wilson interval of a fraction measured on so many samples; 95 % by default."""
    spread = z * math.sqrt(fraction * (1 - fraction) / samples + (z / (2 * samples)) ** 2)
    middle, width = fraction + z * z / (2 * samples), 1 + z * z / samples
    return max(0.0, (middle - spread) / width), min(1.0, (middle + spread) / width)


class Threshold(Part):
    """A certificate: leave at the first exit whose score reaches its own confidence; P(mean loss > epsilon) <= delta.

    promise: what is lost. accuracy: the exit is wrong where the cloud model is right. agreement: another answer than
    the cloud model's, which takes no labels and is the larger of the two.
    among: over which inputs the loss is averaged, all or those that leave at an exit.

    Learn-then-test (Angelopoulos et al., 2021), exact binomial, on `samples` calibration inputs that chose nothing. A
    confidence above 1 means that the exit never answers.
    """

    promise: Promise
    among: Among
    epsilon: Fraction
    delta: Fraction
    confidences: Annotated[tuple[Annotated[float, Field(ge=0, le=2)], ...], Field(min_length=1, max_length=8)]
    shares: Annotated[tuple[Fraction, ...], Field(min_length=1, max_length=8)]  # of all inputs, answered at each exit
    accuracy: Fraction  # of the answers at exits, 0 where there is none
    agreement: Fraction
    loss: Fraction  # observed
    samples: Annotated[int, Field(ge=1)]

    @property
    def coverage(self) -> float:
        """The share of all inputs that is answered on the device."""
        return min(1.0, sum(self.shares))

    @property
    def answers(self) -> bool:
        """Whether any exit answers."""
        return min(self.confidences) <= 1


class Dependencies(Part):
    """What the certificates of a head depend on: where any of it differs, they are void."""

    graphs: Sha256  # of the segments at this precision
    cloud: Sha256  # of the cloud's weights or graphs
    preprocessing: Sha256
    precision: Precision
    runtime: Annotated[str, Field(pattern=r"^[a-z0-9-]{1,32} [0-9]{1,4}\.[0-9]{1,4}$")]  # as "onnxruntime 1.31"


class Head(Part):
    """All segments at one precision, an ONNX graph each, their exits, and the exits' certificates."""

    files: Annotated[tuple[FileName, ...], Field(min_length=1, max_length=8)]
    exits: Annotated[tuple[Exit, ...], Field(min_length=1, max_length=8)]
    thresholds: Annotated[tuple[Threshold, ...], Field(max_length=256)]
    depends_on: Dependencies


class Manifest(BundleManifest):
    """The whole of `manifest.json`."""

    VERSION: ClassVar[int] = 4
    tasks: Annotated[tuple[Task, ...], Field(min_length=1, max_length=8)]
    preprocessing: Preprocessing
    architecture: Architecture
    weights: FileName | None = None  # of the network that the architecture's builder builds; else there are
    graphs: Graphs | None = None
    segments: Annotated[tuple[Segment, ...], Field(min_length=1, max_length=8)]
    heads: dict[Precision, Head]  # fp32 is required; figures of taps are measured with it
    taps: Annotated[tuple[Tap, ...], Field(min_length=1, max_length=8)]
    images: Annotated[tuple[ImageWay, ...], Field(min_length=1, max_length=16)]
    calibration_samples: Annotated[int, Field(ge=1)]  # of which every way's figures are
    tail_macs: Annotated[int, Field(ge=0)]  # after the last segment, first task
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
        self._files_are_listed()
        self._heads_fit()
        self._segments_fit()
        self._names_differ()
        if len(self.taps) != len(self.architecture.taps):
            raise ValueError("taps and architecture.taps must be of one length")
        for tap, built in zip(self.taps, self.architecture.taps, strict=True):
            self._tap_fits(tap, built)
        return self

    def _files_are_listed(self) -> None:
        if (self.weights is None) == (self.graphs is None):
            raise ValueError("there must be either weights or graphs")
        files = [self.weights] if self.weights else []
        if self.graphs:
            files += [self.graphs.image, *self.graphs.taps]
            if len(self.graphs.taps) != len(self.taps):
                raise ValueError("graphs must have one for each tap")
        elif others := [task.kind for task in self.tasks if task.kind != "classify"]:
            raise ValueError(f"weights answer tasks of kind classify, {', '.join(others)} needs graphs")
        files += [name for head in self.heads.values() for name in head.files]
        files += [name for tap in self.taps for name in (tap.encoder, tap.tables)]
        if missing := sorted(set(files) - set(self.files)):
            raise ValueError(f"files does not list {', '.join(missing)}")

    def _heads_fit(self) -> None:
        if "fp32" not in self.heads:
            raise ValueError("heads must have fp32")
        for precision, head in self.heads.items():
            if not len(self.segments) == len(head.files) == len(head.exits) == len(self.architecture.cuts):
                raise ValueError(f"segments, architecture.cuts, files and exits of {precision} must be of one length")
            if [exit_.name for exit_ in head.exits] != [exit_.name for exit_ in self.heads["fp32"].exits]:
                raise ValueError(f"exits of {precision} must be named like those of fp32")
            if any({len(each.confidences), len(each.shares)} != {len(head.exits)} for each in head.thresholds):
                raise ValueError(f"thresholds of {precision} must have a confidence and a share for each exit")
            self._exits_can_answer(precision, head)
            if head.depends_on.precision != precision:
                raise ValueError(f"certificates of {precision} depend on {head.depends_on.precision}")

    def _exits_can_answer(self, precision: Precision, head: Head) -> None:
        for index, exit_ in enumerate(head.exits):
            if exit_.score and (not exit_.answers or self.tasks[0].kind != "classify"):
                raise ValueError(f"exit {exit_.name} of {precision} has a score, but answers no classification")
            if not exit_.answers and any(each.confidences[index] <= 1 for each in head.thresholds):
                raise ValueError(f"exit {exit_.name} of {precision} answers nothing, but a threshold lets it")

    def _segments_fit(self) -> None:
        if self.segments[0].input != (3, *self.preprocessing.crop):
            raise ValueError(
                f"segment 0 takes {self.segments[0].input}, the crop gives {(3, *self.preprocessing.crop)}"
            )
        for index, (before, after) in enumerate(zip(self.segments, self.segments[1:], strict=False)):
            if before.output != after.input:
                raise ValueError(f"segment {index} gives {before.output}, segment {index + 1} takes {after.input}")
        if self.architecture.classes != tuple(task.channels for task in self.tasks):
            raise ValueError(f"architecture.classes is {self.architecture.classes}, tasks have other label counts")

    def _names_differ(self) -> None:
        for what, names in (("tasks", [t.name for t in self.tasks]), ("taps", [t.name for t in self.taps])):
            if len(set(names)) < len(names):
                raise ValueError(f"{what} must have different names")
        if len({(image.form, image.quality) for image in self.images}) < len(self.images):
            raise ValueError("images must differ in form or quality")

    def _tap_fits(self, tap: Tap, built: TapArchitecture) -> None:
        if built.after > len(self.segments):
            raise ValueError(f"tap {tap.name} comes after {built.after} segments, there are {len(self.segments)}")
        if built.latent_channels != tap.latent[0]:
            raise ValueError(f"tap {tap.name}: architecture has {built.latent_channels} latent channels")
        if built.widths != tuple(width.width for width in tap.widths):
            raise ValueError(f"tap {tap.name}: architecture has widths {built.widths}")
        if any(len(width.rates) != built.rates for width in tap.widths):
            raise ValueError(f"tap {tap.name}: architecture has {built.rates} rates")
