from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.cloud_service.vision.compute_time import MEMORY, ComputeTimes


def observed(*batches: tuple[int, float]) -> ComputeTimes:
    times = ComputeTimes()
    for size, seconds in batches:
        times.observe("a", size, seconds)
    return times


def test_nothing_is_known_of_a_kind_before_its_first_batch() -> None:
    assert observed((4, 1.0)).predict("b", 4) == 0.0


def test_one_outlier_changes_nothing() -> None:
    for outlier in (0.0, 90.0):
        assert observed(*[(4, 0.1)] * 4, (4, outlier)).predict("a", 4) == 0.1


def test_two_slow_batches_of_five_count() -> None:
    assert observed(*[(4, 0.1)] * 3, (4, 0.2), (4, 0.3)).predict("a", 4) == 0.2


def test_a_machine_that_is_fast_again_is_found_out() -> None:
    times = observed(*[(4, 5.0)] * MEMORY)
    for _ in range(4):
        times.observe("a", 4, 0.1)
    assert times.predict("a", 4) == 0.1


def test_the_batches_nearest_in_size_are_scaled() -> None:
    times = observed(*[(1, 0.02)] * 5, *[(8, 0.08)] * 5)
    assert [times.predict("a", size) for size in (1, 2, 8, 16)] == pytest.approx([0.02, 0.04, 0.08, 0.16])


def test_a_size_not_seen_for_long_is_forgotten() -> None:
    times = observed(*[(16, 9.0)] * 5, *[(1, 0.01)] * MEMORY)
    assert times.predict("a", 16) == pytest.approx(0.16)


@given(st.lists(st.tuples(st.integers(1, 16), st.floats(0, 10)), max_size=40), st.integers(1, 1024))
def test_a_prediction_lies_within_what_was_seen(batches: list[tuple[int, float]], size: int) -> None:
    each = [seconds / count for count, seconds in batches] or [0.0]
    assert size * min(each) * 0.999 <= observed(*batches).predict("a", size) <= size * max(each) * 1.001
