"""Whether two answers say the same, by kind."""

from __future__ import annotations

from typing import Any

import pytest

from isthmus.edge_agent.streams.agreement import differs, iou, unmatched


def box(index: int, *corners: float, score: float = 0.9) -> dict[str, Any]:
    return {"label": str(index), "index": index, "score": score, "box": list(corners)}


CAT, DOG = {"label": "cat", "index": 0, "confidence": 0.9}, {"label": "dog", "index": 1, "confidence": 0.4}
PERSON, CAR = box(0, 0, 0, 10, 10), box(2, 20, 20, 40, 30)


@pytest.mark.parametrize(
    ("one", "other", "different"),
    [
        ({"a": CAT}, {"a": {**CAT, "confidence": 0.5}}, False),
        ({"a": CAT}, {"a": DOG}, True),
        ({"a": CAT, "b": DOG}, {"a": CAT, "b": CAT}, True),
        ({"a": CAT}, {}, True),
        ({"a": {"detections": []}}, {"a": {"detections": []}}, False),
        ({"a": {"detections": [PERSON]}}, {"a": {"detections": []}}, True),
        ({"a": {"detections": [PERSON, CAR]}}, {"a": {"detections": [CAR, box(0, 1, 0, 10, 10)]}}, False),
        ({"a": {"detections": [PERSON]}}, {"a": {"detections": [box(1, 0, 0, 10, 10)]}}, True),
        ({"a": {"embedding": [1, 2]}}, {"a": {"embedding": [1.1, 2]}}, False),
        ({"a": {"embedding": [1, 0]}}, {"a": {"embedding": [0, 1]}}, True),
        ({"a": {"embedding": [0, 0]}}, {"a": {"embedding": [1]}}, True),
        ({"a": {"shape": [2, 5], "runs": [[0, 10]]}}, {"a": {"shape": [2, 5], "runs": [[0, 8], [1, 2]]}}, False),
        ({"a": {"shape": [2, 5], "runs": [[0, 10]]}}, {"a": {"shape": [2, 5], "runs": [[0, 7], [1, 3]]}}, True),
        ({"a": {"shape": [2, 5], "runs": [[0, 10]]}}, {"a": {"shape": [1, 1], "runs": [[0, 1]]}}, True),
        ({"a": {"other": 1}}, {"a": {"other": 1}}, False),
        ({"a": {"other": 1}}, {"a": {"other": 2}}, True),
    ],
)
def test_differs(one: dict[str, Any], other: dict[str, Any], different: bool) -> None:
    assert differs(one, other) == differs(other, one) == different


def test_each_box_has_one_counterpart() -> None:
    assert unmatched([PERSON, PERSON], [PERSON]) == pytest.approx(1 / 3)


def test_boxes_without_an_area_overlap_nothing() -> None:
    assert iou(box(0, 5, 5, 5, 5), box(0, 5, 5, 5, 5)) == 0
