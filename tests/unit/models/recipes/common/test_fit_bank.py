from __future__ import annotations

import dataclasses

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from isthmus.models.recipes.common.fit_bank import Cells, code_length, frequencies, settle


@given(st.lists(st.floats(0, 1e6), min_size=2, max_size=500))
def test_frequencies_are_whole_and_complete(counts: list[float]) -> None:
    found = frequencies(np.array(counts) + 1e-3)
    assert found.min() >= 1
    assert found.sum() == 1 << 16


def test_a_histogram_keeps_a_table_that_has_the_columns_it_needs() -> None:
    counts_nB = np.array([[0, 0, 90, 10, 0], [20, 20, 20, 20, 20], [0, 0, 90, 10, 0]], float)
    cells = Cells(counts_nB, low_n=np.array([2, 0, 0]), high_n=np.array([3, 4, 4]), zero=2)
    assert settle(cells, np.array([0, 1, 1])).tolist() == [0, 1, 1]
    free = dataclasses.replace(cells, low_n=np.array([2, 0, 2]), high_n=np.array([3, 4, 3]))
    assert settle(free, np.array([0, 1, 1])).tolist() == [0, 1, 0]


def test_code_length_is_the_entropy() -> None:
    assert code_length(np.array([[2.0, 2.0, 0.0], [4.0, 0.0, 0.0]])).tolist() == [4.0, 0.0]
