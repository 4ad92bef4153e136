"""Whether two answers say the same, from their JSON, for bundles of any kind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

SAME_IOU = 0.5  # boxes of one object overlap at least so much
TOLERANCE = 0.2  # of what two answers have not in common


def differs(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether any task's answer differs by more than the tolerance.

    Labels differ at all, boxes by their F1 score, maps by cells, vectors by their angle.
    """
    if one.keys() != other.keys():
        return True
    return any(difference(one[task], other[task]) > TOLERANCE for task in one)


def difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> float:
    """Of two answers to one task, in [0, 1]."""
    if "index" in one:
        return float(one["index"] != other.get("index"))
    if "detections" in one:
        return unmatched(one["detections"], other.get("detections", ()))
    if "runs" in one:
        return other_labels(one, other)
    if "embedding" in one:
        return 1 - cosine(one["embedding"], other.get("embedding", ()))
    return float(one != other)


def other_labels(one: Mapping[str, Any], other: Mapping[str, Any]) -> float:
    """The share of a map's cells that have other labels in two segmentations."""
    if one["shape"] != other.get("shape"):
        return 1.0
    runs = (np.array(each["runs"], np.int64).reshape(-1, 2) for each in (one, other))
    first_N, second_N = (np.repeat(runs_R2[:, 0], runs_R2[:, 1]) for runs_R2 in runs)
    return float((first_N != second_N).mean())


def cosine(one: Sequence[float], other: Sequence[float]) -> float:
    """Of two vectors; 0 where they have no angle."""
    if len(one) != len(other):
        return 0.0
    length = float(np.linalg.norm(one) * np.linalg.norm(other))
    return float(np.dot(one, other)) / length if length else 0.0


def unmatched(one: Sequence[Mapping[str, Any]], other: Sequence[Mapping[str, Any]]) -> float:
    """1 - F1 of two sets of boxes: greedy pairs of a class, the surest first, that overlap enough."""
    if not one and not other:
        return 0.0
    left, pairs = list(other), 0
    for box in sorted(one, key=lambda each: -float(each["score"])):
        same = [each for each in left if each["index"] == box["index"] and iou(box, each) >= SAME_IOU]
        best = max(same, key=partial(iou, box), default=None)
        if best is not None:
            left.remove(best)
            pairs += 1
    return 1 - 2 * pairs / (len(one) + len(other))


def iou(one: Mapping[str, Any], other: Mapping[str, Any]) -> float:
    """Intersection over union of two boxes xyxy."""
    (a, b, c, d), (e, f, g, h) = one["box"], other["box"]
    common = max(0.0, min(c, g) - max(a, e)) * max(0.0, min(d, h) - max(b, f))
    union = (c - a) * (d - b) + (g - e) * (h - f) - common
    return common / union if union > 0 else 0.0
