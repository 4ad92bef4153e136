from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.models.vision.detection.boxes import MAX_CANDIDATES, areas, clip, iou, suppress

SIZE = (40, 60)  # height, width


def candidates(seed: int, count: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Boxes partly outside of the image, and scores with ties."""
    rng = np.random.default_rng(seed)
    corners_N2 = rng.uniform(-20, 70, (count, 2))
    boxes_N4 = np.concatenate([corners_N2, corners_N2 + rng.uniform(-3, 30, (count, 2))], 1).astype(np.float32)
    return boxes_N4, (rng.integers(0, 11, (count, classes)) / 10).astype(np.float32)


def test_overlap_is_of_areas() -> None:
    boxes_N4 = np.array([[0, 0, 10, 10], [5, 0, 15, 10], [20, 20, 30, 30], [3, 3, 3, 9]], np.float32)
    np.testing.assert_array_equal(areas(boxes_N4), [100, 100, 100, 0])
    np.testing.assert_allclose(iou(boxes_N4, boxes_N4[:2])[:, 0], [1, 1 / 3, 0, 0], atol=1e-6)
    assert iou(boxes_N4[:0], boxes_N4).shape == (0, 4)


def test_clipping_keeps_what_is_inside() -> None:
    boxes_N4 = np.array([[-5, -5, 5, 5], [50, 30, 90, 90], [70, 50, 80, 60]], np.float32)
    np.testing.assert_array_equal(clip(boxes_N4, 60, 40), [[0, 0, 5, 5], [50, 30, 60, 40], [60, 40, 60, 40]])


def test_the_lower_of_two_boxes_of_a_class_goes() -> None:
    boxes_N4 = np.array([[0, 0, 20, 20], [1, 0, 21, 20], [0, 0, 20, 20]], np.float32)
    scores_NC = np.array([[0.6, 0], [0.9, 0], [0, 0.5]], np.float32)
    found = suppress(boxes_N4, scores_NC, SIZE, min_score=0.3, nms_iou=0.5, max_boxes=10)
    np.testing.assert_array_equal(found.boxes_M4, [[1, 0, 21, 20], [0, 0, 20, 20]])
    np.testing.assert_allclose(found.scores_M, [0.9, 0.5])
    assert found.classes_M.tolist() == [0, 1]
    assert (found.boxes_M4.dtype, found.scores_M.dtype, found.classes_M.dtype) == (np.float32, np.float32, np.uint16)


def test_nothing_is_found_in_nothing() -> None:
    for boxes_N4, scores_NC in (candidates(0, 0, 3), (candidates(0, 5, 3)[0], np.zeros((5, 3), np.float32))):
        found = suppress(boxes_N4, scores_NC, SIZE, min_score=0.1, nms_iou=0.5, max_boxes=10)
        assert len(found) == 0 and found.boxes_M4.shape == (0, 4)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 1 << 30), st.integers(1, 60), st.integers(1, 4), st.floats(0, 0.95), st.integers(1, 40))
def test_what_is_kept_is_separate_sorted_and_complete(
    seed: int, count: int, classes: int, nms_iou: float, most: int
) -> None:
    boxes_N4, scores_NC = candidates(seed, count, classes)
    found = suppress(boxes_N4, scores_NC, SIZE, min_score=0.35, nms_iou=nms_iou, max_boxes=most)
    assert len(found) <= most and (found.scores_M >= 0.35).all() and (np.diff(found.scores_M) <= 0).all()
    assert (areas(found.boxes_M4) > 0).all()
    np.testing.assert_array_equal(found.boxes_M4, clip(found.boxes_M4, 60, 40))
    same = found.classes_M[:, None] == found.classes_M[None]
    near = (iou(found.boxes_M4, found.boxes_M4) > nms_iou) & same
    assert not (near & ~np.eye(len(found), dtype=bool)).any()
    if len(found) < most:  # whatever was left out is near a better one
        inside_N4 = clip(boxes_N4, 60, 40)
        for row, column in zip(*np.nonzero((scores_NC >= 0.35) & (areas(inside_N4) > 0)[:, None]), strict=True):
            better = (found.classes_M == column) & (found.scores_M >= scores_NC[row, column])
            close = iou(inside_N4[row : row + 1], found.boxes_M4)[0]
            assert ((close > nms_iou) & better).any() or (
                (found.boxes_M4 == inside_N4[row]).all(1) & (found.classes_M == column)
            ).any()


def test_the_work_is_bounded() -> None:
    """Candidates that overlap nowhere, each of them far above the score."""
    count = 2 * MAX_CANDIDATES
    left_N = np.arange(count, dtype=np.float32) * 2
    boxes_N4 = np.stack([left_N, 0 * left_N, left_N + 1, 0 * left_N + 1], 1)
    scores_NC = np.linspace(0.5, 1, count, dtype=np.float32)[:, None]
    found = suppress(boxes_N4, scores_NC, (1, 2 * count), min_score=0.1, nms_iou=0.5, max_boxes=1000)
    np.testing.assert_array_equal(found.scores_M, scores_NC[::-1, 0][:1000])


@pytest.mark.parametrize("score", [0.1, 0.35])
def test_a_score_at_the_bound_counts(score: float) -> None:
    found = suppress(
        np.array([[0, 0, 9, 9]], np.float32), np.array([[score]], np.float32), SIZE,
        min_score=float(np.float32(score)), nms_iou=0.5, max_boxes=1,
    )  # fmt: skip
    assert len(found) == 1
