"""How far two series of answers agree, by kind, from 0 to 1. NumPy only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from isthmus.models.messages import TaskKind
from isthmus.models.recipes.vision.average_precision import mean_average_precision
from isthmus.models.vision.detection.boxes import Boxes
from isthmus.models.vision.outputs import from_runs
from isthmus.models.vision.tasks import AnyTask, SegmentTask

UNIT: dict[TaskKind, str] = {
    "classify": "fraction",
    "detect": "mean average precision at IoU 0.5 against the whole network's boxes",
    "segment": "mean intersection over union with the whole network's map",
    "embed": "mean cosine with the whole network's vector",
}

Answer = tuple[NDArray[Any], ...]  # as `outputs.finish` gives it


def agreement(task: AnyTask, references: Sequence[Answer], answers: Sequence[Answer]) -> float:
    """Of answers with the references, photo by photo. Raises ValueError for a task that classifies."""
    if task.kind == "detect":
        return mean_average_precision([Boxes(*each) for each in references], [Boxes(*each) for each in answers])
    if isinstance(task, SegmentTask):
        maps = [[from_runs(each[0], each[1], task.shape) for each in row] for row in (references, answers)]
        return mean_iou(*maps)
    if task.kind == "embed":
        return float(np.mean([max(cosine(a[0], b[0]), 0.0) for a, b in zip(references, answers, strict=True)]))
    raise ValueError(f"a task of kind {task.kind}")


def mean_iou(references: Sequence[NDArray[Any]], answers: Sequence[NDArray[Any]]) -> float:
    """Over all pixels of all maps: the mean over the classes that either has somewhere."""
    theirs, ours = (np.concatenate([each.reshape(-1) for each in maps]) for maps in (references, answers))
    classes = np.union1d(theirs, ours)
    pairs = [(theirs == index, ours == index) for index in classes]
    ious = [(a & b).sum() / (a | b).sum() for a, b in pairs]
    return float(np.mean(ious))


def cosine(a_D: NDArray[Any], b_D: NDArray[Any]) -> float:
    """Of two vectors; 0 for one of length 0."""
    a_D, b_D = a_D.astype(np.float64), b_D.astype(np.float64)
    length = float(np.linalg.norm(a_D) * np.linalg.norm(b_D))
    return min(float(a_D @ b_D) / length, 1.0) if length else 0.0
