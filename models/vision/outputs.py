"""What tasks of other kinds than classify give: from a graph's outputs, on the wire, and read again. NumPy only.

graph_outputs -> a graph's outputs of one input -> finish -> tensors ~~~ bounds, check -> tensors
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from isthmus.models.messages import OutputBounds, OutputTensor, TensorBound
from isthmus.models.onnx_session import ANY, TensorSpec
from isthmus.models.vision.detection.boxes import suppress
from isthmus.models.vision.tasks import AnyTask, ClassifyTask, DetectTask, EmbedTask, SegmentTask

Floats = NDArray[np.float32]
Raw = Mapping[str, Floats]  # a graph's outputs of one task by their short names, for a batch or for one input

ExitOutput = Floats | Raw | None  # of an exit: probabilities_K where it classifies, outputs of another kind, no exit

SLACK = 1e-3  # of a unit vector's length in float16, and of pixels and scores in float32
LABEL_BYTES, BOX_BYTES, RUN_BYTES, NUMBER_BYTES = 4, 22, 6, 2
USUAL_BOXES, USUAL_RUNS = 16, 2048  # of an answer, where none was seen


def graph_outputs(task: AnyTask, batch: int | None) -> dict[str, TensorSpec]:
    """The outputs of a graph for a task, by their short names, in order; `batch` None for any."""
    match task:
        case ClassifyTask():
            return {"logits": TensorSpec((batch, task.channels))}
        case DetectTask():
            return {"boxes": TensorSpec((batch, ANY, 4)), "scores": TensorSpec((batch, ANY, task.channels))}
        case SegmentTask():
            return {"scores": TensorSpec((batch, task.channels, *task.shape))}
        case EmbedTask():
            return {"embedding": TensorSpec((batch, task.size))}


def finish(task: AnyTask, raw: Raw, input_size: tuple[int, int]) -> tuple[NDArray[Any], ...]:
    """The tensors that answer a task, from the outputs for one input of `input_size` (height, width).

    detect: boxes (M, 4), scores (M,), classes (M,). segment: classes (R,), lengths (R,) of runs. embed: (D,) float16.
    Raises ValueError where the outputs are not finite, or contradict each other.
    """
    if not all(np.isfinite(array).all() for array in raw.values()):
        raise ValueError("values that are not finite")
    match task:
        case DetectTask():
            if len(raw["boxes"]) != len(raw["scores"]):
                raise ValueError(f"{len(raw['boxes'])} boxes and {len(raw['scores'])} rows of scores")
            scores_NC = np.clip(raw["scores"], 0, 1)
            bounds = {"min_score": task.min_score, "nms_iou": task.nms_iou}
            found = suppress(raw["boxes"], scores_NC, input_size, max_boxes=task.max_boxes, **bounds)
            return found.boxes_M4, found.scores_M, found.classes_M
        case SegmentTask():
            return to_runs(raw["scores"].argmax(0))
        case EmbedTask():
            vector_D = raw["embedding"]
            if task.normalised:
                vector_D = vector_D / max(float(np.linalg.norm(vector_D)), 1e-12)
            with np.errstate(over="ignore"):
                half_D = vector_D.astype(np.float16)
            if not np.isfinite(half_D).all():
                raise ValueError("values beyond those of float16")
            return (half_D,)
    raise ValueError(f"a task of kind {task.kind}")


def bounds_of(task: AnyTask, input_size: tuple[int, int]) -> int | OutputBounds:
    """What a reply must hold for a task: a number of probabilities, or tensors."""
    match task:
        case ClassifyTask():
            return len(task.labels)
        case DetectTask():
            sizes: tuple[tuple[str, Any, tuple[int, ...]], ...] = (
                ("boxes", "float32", (task.max_boxes, 4)),
                ("scores", "float32", (task.max_boxes,)),
                ("classes", "uint16", (task.max_boxes,)),
            )
        case SegmentTask():
            most = (task.shape[0] * task.shape[1],)
            sizes = ("classes", "uint16", most), ("lengths", "uint32", most)
        case EmbedTask():
            sizes = (("embedding", "float16", (task.size,)),)
    tensors = tuple(
        TensorBound(f"{task.name}.{name}", dtype, shape, not isinstance(task, EmbedTask))
        for name, dtype, shape in sizes
    )
    return OutputBounds(tensors, partial(check, task, input_size))


def check(task: AnyTask, input_size: tuple[int, int], arrays: Sequence[NDArray[Any]]) -> None:
    """Raises ValueError for tensors of the right shape that are no answer to the task."""
    match task:
        case DetectTask():
            check_boxes(task, input_size, *arrays)
        case SegmentTask():
            classes_R, lengths_R = arrays
            pixels = int(lengths_R.sum(dtype=np.uint64))
            if len(classes_R) != len(lengths_R) or pixels != task.shape[0] * task.shape[1] or not lengths_R.all():
                raise ValueError(f"runs of {task.name} of {pixels} pixels, expected {task.shape[0] * task.shape[1]}")
            check_classes(task, classes_R)
        case EmbedTask():
            length = float(np.linalg.norm(arrays[0].astype(np.float64)))
            if task.normalised and abs(length - 1) > 10 * SLACK:
                raise ValueError(f"{task.name} of length {length:.3g}, expected 1")


def check_boxes(
    task: DetectTask, size: tuple[int, int], boxes_M4: Floats, scores_M: Floats, classes_M: NDArray[np.uint16]
) -> None:
    """Raises ValueError unless boxes lie in the input, scores fall, and every box has both a score and a label."""
    if not len(boxes_M4) == len(scores_M) == len(classes_M):
        raise ValueError(f"{len(boxes_M4)} boxes of {task.name}, {len(scores_M)} scores, {len(classes_M)} classes")
    height, width = size
    inside = (boxes_M4 >= -SLACK) & (boxes_M4 <= np.array([width, height, width, height], np.float32) + SLACK)
    if not inside.all() or not (boxes_M4[:, :2] <= boxes_M4[:, 2:]).all():
        raise ValueError(f"boxes of {task.name} that are not corners within {width}x{height} pixels")
    if not ((scores_M >= task.min_score - SLACK) & (scores_M <= 1)).all() or not (np.diff(scores_M) <= 0).all():
        raise ValueError(f"scores of {task.name} that do not fall from 1 to {task.min_score}")
    check_classes(task, classes_M)


def check_classes(task: DetectTask | SegmentTask, classes_N: NDArray[np.uint16]) -> None:
    """Raises ValueError for a class without a label."""
    if len(classes_N) and int(classes_N.max()) >= len(task.labels):
        raise ValueError(f"class {int(classes_N.max())} of {task.name}, which has {len(task.labels)} labels")


def named(task: AnyTask, arrays: Sequence[NDArray[Any]], input_size: tuple[int, int]) -> tuple[OutputTensor, ...]:
    """The tensors under the names that they have on the wire."""
    bounds = bounds_of(task, input_size)
    tensors = () if isinstance(bounds, int) else bounds.tensors
    return tuple(OutputTensor(bound.name, array) for bound, array in zip(tensors, arrays, strict=True))


def to_runs(map_HW: NDArray[np.integer[Any]]) -> tuple[NDArray[np.uint16], NDArray[np.uint32]]:
    """A map of classes as runs in row-major order: the class (R,) and the length (R,) of each."""
    flat = map_HW.reshape(-1)
    starts_R = np.concatenate([[0], np.flatnonzero(np.diff(flat)) + 1])
    return flat[starts_R].astype(np.uint16), np.diff(np.append(starts_R, len(flat))).astype(np.uint32)


def from_runs(classes_R: NDArray[np.uint16], lengths_R: NDArray[np.uint32], shape: tuple[int, int]) -> NDArray[Any]:
    """The map (H, W) uint16 that `to_runs` was given."""
    return np.repeat(classes_R, lengths_R).astype(np.uint16).reshape(shape)


def usual_bytes(task: AnyTask) -> int:
    """The bytes of an answer on the wire that are expected before one was seen."""
    match task:
        case ClassifyTask():
            return LABEL_BYTES * len(task.labels)
        case DetectTask():
            return BOX_BYTES * min(task.max_boxes, USUAL_BOXES)
        case SegmentTask():
            return RUN_BYTES * min(task.shape[0] * task.shape[1], USUAL_RUNS)
        case EmbedTask():
            return NUMBER_BYTES * task.size


def most_bytes(task: AnyTask) -> int:
    """The bytes that an answer has at most."""
    match task:
        case DetectTask():
            return BOX_BYTES * task.max_boxes
        case SegmentTask():
            return RUN_BYTES * task.shape[0] * task.shape[1]
    return usual_bytes(task)
