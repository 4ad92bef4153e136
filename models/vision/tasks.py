"""What a network answers, by kind: a class, boxes, a class for each pixel, or a vector.

    kind      the graph's outputs for a batch            an answer
    classify  logits (B, K)                              probabilities (K,)
    detect    <task>.boxes (B, N, 4), <task>.scores (B, N, K)   boxes (M, 4), scores (M,), classes (M,)
    segment   <task>.scores (B, K, H, W)                 a class for each pixel (H, W), as run lengths
    embed     <task>.embedding (B, D)                    a vector (D,)

Values only; `outputs` computes and checks answers.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias, get_args

from pydantic import BeforeValidator, Field, model_validator

from isthmus.models.bundle.manifest import Fraction, Name, Part
from isthmus.models.messages import TaskKind
from isthmus.models.vision.architecture import Side

MAX_MASK_PIXELS = 1 << 19  # a class and a length of up to six bytes for each fit a message
MAX_CLASSES = 1 << 16  # numbers of two bytes on the wire
MAX_BOXES = 1000

Labels = Annotated[tuple[str, ...], Field(min_length=1, max_length=MAX_CLASSES)]


class ClassifyTask(Part):
    """One of the labels. Exits compute the first task only."""

    kind: Annotated[Literal["classify"], Field(exclude_if=lambda kind: True)] = "classify"  # manifests leave it out
    name: Name
    labels: Annotated[tuple[str, ...], Field(min_length=2, max_length=100_000)]

    @property
    def channels(self) -> int:
        """Numbers that the network gives: one for each label."""
        return len(self.labels)


class DetectTask(Part):
    """Boxes of the labels.

    The network gives candidates: boxes xyxy in pixels of its input, and a score in [0, 1] for each label. Those below
    `min_score` are left out, and of two of one label whose intersection over union exceeds `nms_iou` the lower one.
    """

    kind: Literal["detect"] = "detect"
    name: Name
    labels: Labels
    max_boxes: Annotated[int, Field(ge=1, le=MAX_BOXES)]
    min_score: Annotated[float, Field(gt=0, le=1)]
    nms_iou: Fraction

    @property
    def channels(self) -> int:
        """Scores of a candidate: one for each label."""
        return len(self.labels)


class SegmentTask(Part):
    """A label for each pixel of a map of `shape` (height, width), which covers the network's input."""

    kind: Literal["segment"] = "segment"
    name: Name
    labels: Labels
    shape: tuple[Side, Side]

    @model_validator(mode="after")
    def _map_fits_a_message(self) -> SegmentTask:
        if self.shape[0] * self.shape[1] > MAX_MASK_PIXELS:
            raise ValueError(f"shape {self.shape} has more than {MAX_MASK_PIXELS} pixels")
        return self

    @property
    def channels(self) -> int:
        """Scores of a pixel: one for each label."""
        return len(self.labels)


class EmbedTask(Part):
    """A vector of `size` numbers; of length 1 (L2) where it is `normalised`."""

    kind: Literal["embed"] = "embed"
    name: Name
    size: Annotated[int, Field(ge=1, le=1 << 16)]
    normalised: bool = True

    @property
    def labels(self) -> tuple[str, ...]:
        """None."""
        return ()

    @property
    def channels(self) -> int:
        """Numbers of the vector."""
        return self.size


def of_kind(value: Any) -> Any:
    """A task of the kind that it states, `classify` where it states none. Raises ValueError for an unknown one."""
    if not isinstance(value, dict):
        return value
    if (kind := value.get("kind", "classify")) not in get_args(TaskKind):
        raise ValueError(f"kind is {kind!r:.32}, expected one of {', '.join(get_args(TaskKind))}")
    return BY_KIND[kind].model_validate(value)


AnyTask = ClassifyTask | DetectTask | SegmentTask | EmbedTask
BY_KIND: dict[str, type[AnyTask]] = {
    "classify": ClassifyTask,
    "detect": DetectTask,
    "segment": SegmentTask,
    "embed": EmbedTask,
}
Task: TypeAlias = Annotated[AnyTask, BeforeValidator(of_kind)]
