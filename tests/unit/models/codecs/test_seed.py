from __future__ import annotations

from itertools import accumulate

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.models.codecs.seed import seed_of, symbols_of
from tests.unit.models.codecs.codec_tables import random_frequencies
from tests.unit.models.codecs.reference import seeded_symbols

HALVES = [0, 1 << 15, 1 << 16]


def starts(seed: int, count: int) -> list[list[int]]:
    """Random tables as cumulative frequencies."""
    rng = np.random.default_rng(seed)
    return [[0, *accumulate(random_frequencies(rng, int(rng.integers(2, 40))).tolist())] for _ in range(count)]


@given(seed=st.integers(0, 1 << 32), count=st.integers(0, 30))
def test_symbols_undo_the_seed(seed: int, count: int) -> None:
    rng, tables = np.random.default_rng(seed), starts(seed, count)
    symbols = [int(rng.integers(len(table) - 1)) for table in tables]
    assert symbols_of(seed_of(symbols, tables), tables) == symbols


@given(seed=st.integers(0, 1 << 32), number=st.integers(0, 1 << 200), count=st.integers(0, 10))
def test_a_number_is_refused_or_is_what_its_symbols_make(seed: int, number: int, count: int) -> None:
    tables = starts(seed, count)
    try:
        symbols = symbols_of(number >> int(seed % 200), tables)
    except ValueError:
        return
    assert seed_of(symbols, tables) == number >> int(seed % 200)


@given(seed=st.integers(0, 1 << 32), count=st.integers(1, 6))
def test_fractions_read_the_same_symbols(seed: int, count: int) -> None:
    rng, tables = np.random.default_rng(seed), starts(seed, count)
    symbols = [int(np.argmax(np.diff(table))) if rng.random() < 0.8 else 0 for table in tables]
    frequencies = [np.diff(table).tolist() for table in tables]
    assert seeded_symbols(seed_of(symbols, tables), frequencies) == symbols


def test_no_symbols_are_zero() -> None:
    assert seed_of([], []) == 0
    assert symbols_of(0, []) == []


def test_fewer_bits_come_first() -> None:
    assert [seed_of([a, b], [HALVES, HALVES]) for a in (0, 1) for b in (0, 1)] == [0, 4, 2, 6]  # none, 01, 1, 11


def test_the_likely_costs_nothing() -> None:
    assert seed_of([0] * 5, [[0, 65_535, 65_536]] * 5) == 0


@pytest.mark.parametrize(("number", "message"), [(3, "not the shortest"), (1 << 17, "17 bits for 1 symbols")])
def test_more_bits_than_the_symbols_need_are_refused(number: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        symbols_of(number, [HALVES])
