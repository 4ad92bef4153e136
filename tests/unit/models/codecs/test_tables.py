from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from isthmus.models.codecs.tables import Tables, check_tables, from_tensors, to_tensors
from isthmus.models.errors import BundleError
from tests.unit.models.codecs.codec_tables import fixed_tables, random_tables

Tensors = dict[str, NDArray[Any]]


def changed(name: str, change: Callable[[NDArray[Any]], Any]) -> Tables:
    """The fixed tables with one array changed in place or replaced."""
    array = getattr(fixed_tables(), name).copy()
    replaced = change(array)
    return dataclasses.replace(fixed_tables(), **{name: array if replaced is None else replaced})


def put(*index: int, value: float) -> Callable[[NDArray[Any]], None]:
    """Set one entry."""

    def change(array: NDArray[Any]) -> None:
        array[index] = value

    return change


@given(seed=st.integers(0, 1 << 32), channels=st.integers(1, 4))
def test_tables_survive_a_safetensors_file(seed: int, channels: int) -> None:
    tables = random_tables(seed, channels)
    again = from_tensors(safetensors.numpy.load(safetensors.numpy.save(to_tensors(tables))), len(tables.gain_RC))
    check_tables(again, channels)
    for field in dataclasses.fields(Tables):
        before, after = getattr(tables, field.name), getattr(again, field.name)
        np.testing.assert_array_equal(after, before)
        assert after.dtype == before.dtype


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (changed("gain_RC", put(0, 0, value=0)), "gains must be positive and finite"),
        (changed("gain_RC", put(0, 0, value=np.nan)), "gains must be positive and finite"),
        (changed("gain_RC", put(0, 0, value=np.inf)), "gains must be positive and finite"),
        (changed("gain_RC", lambda a: a[:, :2]), "tables are for 2 channels, expected 3"),
        (changed("low_RC", lambda a: a[:, :2]), "lowest and highest integers are not for"),
        (changed("high_RC", lambda a: a[:0]), "lowest and highest integers are not for"),
        (changed("low_RC", put(0, 2, value=2)), "highest integer must not be below its lowest"),
        (changed("low_RC", put(0, 1, value=0)), "3 channels are not silent"),
        (changed("near_L2", lambda a: a[:1]), "2 channels are not silent"),
        (changed("near_L2", put(0, 0, value=4)), "has a weight above 3"),
        (changed("slope_L", lambda a: a[:1]), "2 channels are not silent"),
        (changed("bias_L2", lambda a: a[:, :1]), "2 channels are not silent"),
        (changed("ends_L24", lambda a: a[:, :, :3]), "2 channels are not silent"),
        (changed("prior_LK", lambda a: a[:, 1:]), "2 channels are not silent"),
        (changed("prior_LK", put(1, 7, value=5)), "prior that does not exist, there are 5"),
        (changed("prior_LK", put(0, 0, value=1)), "prior that does not cover its channel's integers"),
        (changed("first_E", put(0, value=-1)), "prior that does not cover its channel's integers"),
        (changed("first_E", put(0, value=-3)), "prior that does not cover its channel's integers"),
        (changed("first_E", put(3, value=-513)), "within 512 of zero"),
        (changed("first_E", lambda a: a[:4]), "5 tables and 4 first integers"),
        (changed("table_E", put(4, value=0)), "in the order of their tables, of which there are 3"),
        (changed("table_E", put(4, value=3)), "in the order of their tables, of which there are 3"),
        (changed("lengths_T", put(0, value=6)), "tables have 15 frequencies, there are 14"),
        (changed("lengths_T", lambda a: np.array([1, 6, 7], np.uint16)), "table 0: needs 2 to 512 frequencies"),
        (changed("frequencies", put(0, value=0)), "table 0: needs 2 to 512 frequencies >= 1"),
        (changed("frequencies", put(5, value=60_001)), r"table 1: frequencies must add up to 2\*\*16"),
    ],
)
def test_unsound_tables_are_refused(broken: Tables, message: str) -> None:
    with pytest.raises(BundleError, match=message):
        check_tables(broken, 3)


def test_there_must_be_a_rate_a_table_and_a_prior() -> None:
    for name, message in (("gain_RC", "0 rates"), ("lengths_T", "there are no tables"), ("table_E", "0 tables and 5")):
        with pytest.raises(BundleError, match=message):
            check_tables(changed(name, lambda array: array[:0]), 3)


def test_priors_must_have_numbers_of_8_bits() -> None:
    many = dataclasses.replace(fixed_tables(), table_E=np.zeros(256, np.uint8), first_E=np.full(256, -2, np.int16))
    with pytest.raises(BundleError, match="256 tables and 256 first integers for 1 to 255 priors"):
        check_tables(many, 3)


def test_a_table_may_not_be_longer_than_integers_need() -> None:
    long = np.concatenate([np.ones(600), [65_536 - 600]]).astype(np.uint16)
    broken = dataclasses.replace(
        fixed_tables(),
        lengths_T=np.array([5, 2, 7, 601], np.uint16),
        frequencies=np.concatenate([fixed_tables().frequencies, long]),
    )
    with pytest.raises(BundleError, match="table 3: needs 2 to 512"):
        check_tables(broken, 3)


@pytest.mark.parametrize("name", sorted(to_tensors(fixed_tables())))
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda array: None, "is missing, expected"),
        (lambda array: array.astype(np.float64), "is float64 of shape"),
        (lambda array: array[None], "with . axes"),
    ],
)
def test_arrays_of_another_kind_are_refused(name: str, change: Callable[[Any], Any], message: str) -> None:
    tensors: Tensors = to_tensors(fixed_tables())
    replaced = change(tensors.pop(name))
    if replaced is not None:
        tensors[name] = replaced
    with pytest.raises(BundleError, match=f"tensor {name} .*{message}"):
        from_tensors(tensors, 1)


def test_tables_for_other_rates_are_refused() -> None:
    with pytest.raises(BundleError, match="tables are for 1 rates, expected 2"):
        from_tensors(to_tensors(fixed_tables()), 2)


def test_the_costliest_prior_of_the_last_phase_counts() -> None:
    assert fixed_tables().bits(0) == 3  # the table of seven symbols, each frequency rounded down to a power of two
