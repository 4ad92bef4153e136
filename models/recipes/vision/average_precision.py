"""Mean average precision of boxes against those of another model, or of labels. NumPy only.

A box is right if a reference box of its class, in the same photo, overlaps it enough and no better box has taken it.
Average precision is the area below precision as a function of recall, each precision the best at that recall or a
higher one (Everingham et al., "The Pascal Visual Object Classes Challenge", IJCV 2010; every recall counts).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from isthmus.models.vision.detection.boxes import Boxes, iou

Floats = NDArray[np.float64]


def mean_average_precision(references: Sequence[Boxes], answers: Sequence[Boxes], least_iou: float = 0.5) -> float:
    """The mean over the classes that have a reference box in some photo; 1 without any reference box or answer.

    references, answers: of each photo, in the same order.
    """
    classes = sorted({int(index) for boxes in references for index in boxes.classes_M})
    if not classes:
        return float(all(len(boxes) == 0 for boxes in answers))
    return float(np.mean([average_precision(references, answers, index, least_iou) for index in classes]))


def average_precision(
    references: Sequence[Boxes], answers: Sequence[Boxes], index: int, least_iou: float = 0.5
) -> float:
    """Of one class, which has a reference box."""
    scores, right = [np.empty(0)], [np.empty(0, bool)]
    for reference, answer in zip(references, answers, strict=True):
        wanted_M4 = reference.boxes_M4[reference.classes_M == index]
        own_M = answer.classes_M == index
        scores.append(answer.scores_M[own_M].astype(np.float64))
        right.append(matched(answer.boxes_M4[own_M], wanted_M4, least_iou))
    total = sum(int((reference.classes_M == index).sum()) for reference in references)
    order_N = np.argsort(-np.concatenate(scores), kind="stable")
    right_N = np.concatenate(right)[order_N]
    found_N = np.cumsum(right_N)
    precision_N = found_N / np.arange(1, len(found_N) + 1)
    best_N = np.maximum.accumulate(precision_N[::-1])[::-1]
    return float(best_N[right_N].sum() / total)


def matched(boxes_M4: NDArray[np.float32], wanted_K4: NDArray[np.float32], least_iou: float) -> NDArray[np.bool_]:
    """Which boxes, best first, take a reference box: the one that they overlap most of those that are left."""
    overlap_MK, right_M = iou(boxes_M4, wanted_K4), np.zeros(len(boxes_M4), bool)
    if not len(wanted_K4):
        return right_M
    for row, overlap_K in enumerate(overlap_MK):
        best = int(overlap_K.argmax())
        if overlap_K[best] >= least_iou:
            right_M[row] = True
            overlap_MK[:, best] = -1
    return right_M
