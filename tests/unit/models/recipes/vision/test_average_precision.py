from __future__ import annotations

import numpy as np
import pytest

from isthmus.models.recipes.vision.average_precision import mean_average_precision
from isthmus.models.vision.detection.boxes import Boxes

Row = tuple[float, float, float, float, float, int]  # corners, score, class


def boxes(*rows: Row) -> Boxes:
    array = np.array(rows, np.float32).reshape(-1, 6)
    return Boxes(array[:, :4], array[:, 4], array[:, 5].astype(np.uint16))


FIRST: Row = (0, 0, 10, 10, 0.9, 1)
SECOND: Row = (20, 20, 40, 40, 0.8, 1)


def test_the_same_boxes_are_precise() -> None:
    assert mean_average_precision([boxes(FIRST, SECOND)], [boxes(FIRST, SECOND)]) == 1


def test_a_box_of_another_class_is_wrong() -> None:
    assert mean_average_precision([boxes(FIRST)], [boxes((*FIRST[:5], 2))]) == 0


@pytest.mark.parametrize(("shift", "right"), [(3, 1.0), (4, 0.0)])
def test_a_box_must_overlap_by_half(shift: float, right: float) -> None:
    moved: Row = (shift, 0, 10 + shift, 10, 0.9, 1)  # of 13 and of 14 columns together 7 and 6 are common
    assert mean_average_precision([boxes(FIRST)], [boxes(moved)]) == right


def test_a_second_box_of_one_object_is_wrong_and_counts_by_its_score() -> None:
    answers = boxes(FIRST, (0, 0, 10, 9, 0.85, 1), SECOND)
    assert mean_average_precision([boxes(FIRST, SECOND)], [answers]) == pytest.approx((1 + 2 / 3) / 2)


def test_a_missing_box_costs_its_recall() -> None:
    assert mean_average_precision([boxes(FIRST, SECOND)], [boxes(FIRST)]) == pytest.approx(0.5)


def test_scores_order_the_boxes_of_all_photos() -> None:
    wrong: Row = (50, 50, 60, 60, 0.95, 1)
    assert mean_average_precision([boxes(FIRST), boxes()], [boxes(FIRST), boxes(wrong)]) == pytest.approx(0.5)
    late: Row = (*wrong[:4], 0.1, 1)
    assert mean_average_precision([boxes(FIRST), boxes()], [boxes(FIRST), boxes(late)]) == 1


def test_every_class_of_the_reference_counts_alike() -> None:
    other: Row = (*SECOND[:5], 7)
    assert mean_average_precision([boxes(FIRST, other)], [boxes(FIRST, SECOND)]) == pytest.approx(0.5)


def test_nothing_wanted_and_nothing_answered_is_right() -> None:
    assert mean_average_precision([boxes()], [boxes()]) == 1
    assert mean_average_precision([boxes()], [boxes(FIRST)]) == 0
