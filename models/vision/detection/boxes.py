"""Boxes as corners (x1, y1, x2, y2): overlap, clipping, and non-maximum suppression. NumPy only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

MAX_CANDIDATES = 4096  # of the highest scores, that suppression looks at


@dataclass(frozen=True, slots=True, eq=False)
class Boxes:
    """Boxes xyxy (M, 4) float32, their scores (M,) float32 in falling order, their classes (M,) uint16."""

    boxes_M4: Floats
    scores_M: Floats
    classes_M: NDArray[np.uint16]

    def __len__(self) -> int:
        return len(self.scores_M)


def areas(boxes_N4: NDArray[Any]) -> NDArray[Any]:
    """The area of each box; 0 of one whose corners are exchanged."""
    sides_N2 = np.maximum(boxes_N4[:, 2:] - boxes_N4[:, :2], 0)
    area_N: NDArray[Any] = sides_N2[:, 0] * sides_N2[:, 1]
    return area_N


def iou(boxes_N4: NDArray[Any], others_M4: NDArray[Any]) -> NDArray[Any]:
    """Intersection over union (N, M), in [0, 1]; 0 for boxes without an area."""
    corner_NM2 = np.maximum(boxes_N4[:, None, :2], others_M4[None, :, :2])
    sides_NM2 = np.maximum(np.minimum(boxes_N4[:, None, 2:], others_M4[None, :, 2:]) - corner_NM2, 0)
    common_NM = sides_NM2[..., 0] * sides_NM2[..., 1]
    union_NM = areas(boxes_N4)[:, None] + areas(others_M4)[None] - common_NM
    found: NDArray[Any] = np.divide(common_NM, union_NM, out=np.zeros_like(common_NM), where=union_NM > 0)
    return found


def clip(boxes_N4: Floats, width: float, height: float) -> Floats:
    """The boxes' parts inside an image of these sizes."""
    most_4 = np.array([width, height, width, height], np.float32)
    return np.clip(boxes_N4, np.float32(0), most_4)


def suppress(
    boxes_N4: Floats, scores_NC: Floats, size: tuple[int, int], *, min_score: float, nms_iou: float, max_boxes: int
) -> Boxes:
    """Candidates -> boxes of score >= `min_score`, highest first, none within `nms_iou` of a better one of its class.

    boxes_N4: xyxy in pixels of an image of `size` (height, width), to which they are clipped; boxes without an area
    there are left out. scores_NC: of each class; a candidate may become a box of several. Ties keep the order of
    candidates, then of classes. Greedy, as in Girshick et al. (2014), over at most MAX_CANDIDATES.
    """
    height, width = size
    clipped_N4 = clip(boxes_N4.astype(np.float32), width, height)
    usable_NC = (scores_NC >= min_score) & (areas(clipped_N4) > 0)[:, None]
    rows_K, classes_K = np.nonzero(usable_NC)
    order_K = np.argsort(-scores_NC[rows_K, classes_K], kind="stable")[:MAX_CANDIDATES]
    rows_K, classes_K = rows_K[order_K], classes_K[order_K]
    chosen_M = np.array(survivors(clipped_N4[rows_K], classes_K, nms_iou, max_boxes), np.intp)
    rows_M, classes_M = rows_K[chosen_M], classes_K[chosen_M]
    scores_M = scores_NC[rows_M, classes_M].astype(np.float32)
    return Boxes(clipped_N4[rows_M], scores_M, classes_M.astype(np.uint16))


def survivors(boxes_K4: Floats, classes_K: NDArray[np.intp], nms_iou: float, most: int) -> list[int]:
    """Indices of the boxes, best first, that no better one of their class suppresses."""
    chosen, waiting_K = list[int](), np.arange(len(classes_K))
    while len(waiting_K) and len(chosen) < most:
        best, rest = int(waiting_K[0]), waiting_K[1:]
        chosen.append(best)
        near = iou(boxes_K4[best][None], boxes_K4[rest])[0] > nms_iou
        waiting_K = rest[~(near & (classes_K[rest] == classes_K[best]))]
    return chosen
