"""The integer tables of the contextual codec, as a bundle stores them for a bottleneck, and their validation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from isthmus.models.codecs.context_model import (
    ALL_CONTEXTS,
    CONTEXTS,
    ENDS,
    NON_ANCHOR,
    OUTSIDE,
    ContextWeights,
    Priors,
)
from isthmus.models.errors import BundleError

FREQUENCY_BITS = 16  # CompressAI's precision
MAX_SYMBOLS = 512  # of a table; integers have 8 bits, a prior may start below the lowest and end above the highest
MAX_NEAR = 3  # weight of a sum of neighbours; keeps lookups small


@dataclass(frozen=True)
class Tables:
    """R rates of C channels, of which L rows, rate after rate, are not silent (low < high); T tables, E priors.

    gain: integers = round(latent * gain). low, high: the range of a channel's integers.
    near, slope, bias, ends: weights of a row's contexts (`context_model`). prior: the prior of each context.
    table, first: of a prior, its table and the integer of that table's first symbol; priors are sorted by table.
    lengths, frequencies: the tables concatenated, each entry >= 1, each table's sum 2**16.
    """

    gain_RC: NDArray[np.float32]
    low_RC: NDArray[np.int8]
    high_RC: NDArray[np.int8]
    near_L2: NDArray[np.uint8]
    slope_L: NDArray[np.int16]
    bias_L2: NDArray[np.int16]
    ends_L24: NDArray[np.int8]
    prior_LK: NDArray[np.uint8]
    table_E: NDArray[np.uint8]
    first_E: NDArray[np.int16]
    lengths_T: NDArray[np.uint16]
    frequencies: NDArray[np.uint16]

    def bank(self) -> list[NDArray[np.int64]]:
        """The frequencies of each table."""
        ends = np.cumsum(self.lengths_T, dtype=np.int64)
        return np.split(self.frequencies.astype(np.int64), ends[:-1])

    def bits(self, rate: int) -> int:
        """About the most bits that a non-anchor's symbol takes on average at a rate; the same on every machine."""
        used = np.unique(self.table_E[self.contexts(rate)[1][:, CONTEXTS[NON_ANCHOR]]]).tolist()
        tables: list[list[int]] = [self.bank()[table].tolist() for table in used]
        lengths = [sum(f * (FREQUENCY_BITS + 1 - f.bit_length()) for f in table) for table in tables]
        return max([1, *(length >> FREQUENCY_BITS for length in lengths)])

    def contexts(self, rate: int) -> tuple[ContextWeights, Priors]:
        """Weights and priors of a rate's channels that are not silent."""
        live_RC = self.low_RC < self.high_RC
        end = int(live_RC[: rate + 1].sum())
        rows, live_C = slice(end - int(live_RC[rate].sum()), end), live_RC[rate]
        weights = ContextWeights(
            low_C=self.low_RC[rate, live_C],
            high_C=self.high_RC[rate, live_C],
            near_C2=self.near_L2[rows],
            slope_C=self.slope_L[rows],
            bias_C2=self.bias_L2[rows],
            ends_C24=self.ends_L24[rows],
        )
        return weights, self.prior_LK[rows]


SHAPES = {
    "gain_RC": (np.float32, 2),
    "low_RC": (np.int8, 2),
    "high_RC": (np.int8, 2),
    "near_L2": (np.uint8, 2),
    "slope_L": (np.int16, 1),
    "bias_L2": (np.int16, 2),
    "ends_L24": (np.int8, 3),
    "prior_LK": (np.uint8, 2),
    "table_E": (np.uint8, 1),
    "first_E": (np.int16, 1),
    "lengths_T": (np.uint16, 1),
    "frequencies": (np.uint16, 1),
}


def check_tables(tables: Tables, channels: int) -> None:
    """Raise BundleError unless the tables are usable for `channels` channels."""
    rates, found = tables.gain_RC.shape
    if not rates or found != channels:
        raise BundleError(f"tables are for {found} channels, expected {channels}, and {rates} rates")
    if not tables.low_RC.shape == tables.high_RC.shape == (rates, channels):
        raise BundleError(f"lowest and highest integers are not for {rates} rates of {channels} channels")
    if not (np.isfinite(tables.gain_RC).all() and (tables.gain_RC > 0).all()):
        raise BundleError("gains must be positive and finite")
    if (tables.low_RC > tables.high_RC).any():
        raise BundleError("a channel's highest integer must not be below its lowest")
    check_bank(tables)
    check_rows(tables)


def check_bank(tables: Tables) -> None:
    """Raise BundleError unless tables and priors are valid."""
    if not len(tables.lengths_T):
        raise BundleError("there are no tables")
    if (total := tables.lengths_T.sum(dtype=np.int64)) != len(tables.frequencies):
        raise BundleError(f"tables have {total} frequencies, there are {len(tables.frequencies)}")
    for index, frequencies in enumerate(tables.bank()):
        if not 2 <= len(frequencies) <= MAX_SYMBOLS or (frequencies < 1).any():
            raise BundleError(f"table {index}: needs 2 to {MAX_SYMBOLS} frequencies >= 1")
        if frequencies.sum() != 1 << FREQUENCY_BITS:
            raise BundleError(f"table {index}: frequencies must add up to 2**{FREQUENCY_BITS}")
    if len(tables.table_E) != len(tables.first_E) or not 1 <= len(tables.table_E) <= OUTSIDE:
        raise BundleError(f"{len(tables.table_E)} tables and {len(tables.first_E)} first integers for 1 to 255 priors")
    if (np.diff(tables.table_E.astype(int)) < 0).any() or tables.table_E[-1] >= len(tables.lengths_T):
        raise BundleError(f"priors must be in the order of their tables, of which there are {len(tables.lengths_T)}")
    if (np.abs(tables.first_E.astype(int)) > MAX_SYMBOLS).any():
        raise BundleError(f"first integers of priors must lie within {MAX_SYMBOLS} of zero")


def check_rows(tables: Tables) -> None:
    """Raise BundleError unless every channel that is not silent has contexts whose priors cover its integers."""
    live_RC = tables.low_RC < tables.high_RC
    low_L1, high_L1 = tables.low_RC[live_RC][:, None].astype(int), tables.high_RC[live_RC][:, None].astype(int)
    rows = len(low_L1)
    arrays = (tables.near_L2, tables.slope_L, tables.bias_L2, tables.ends_L24, tables.prior_LK)
    shapes = [array.shape for array in arrays]
    if shapes != [(rows, 2), (rows,), (rows, 2), (rows, 2, ENDS), (rows, ALL_CONTEXTS)]:
        raise BundleError(f"contexts have shapes {shapes}, {rows} channels are not silent")
    if (tables.near_L2 > MAX_NEAR).any():
        raise BundleError(f"a sum of neighbours has a weight above {MAX_NEAR}")
    if (tables.prior_LK >= len(tables.table_E)).any():
        raise BundleError(f"a context has a prior that does not exist, there are {len(tables.table_E)}")
    first_LK = tables.first_E.astype(int)[tables.prior_LK]
    last_LK = first_LK + tables.lengths_T.astype(int)[tables.table_E][tables.prior_LK] - 1
    if (first_LK > low_L1).any() or (last_LK < high_L1).any():
        raise BundleError("a context has a prior that does not cover its channel's integers")


def to_tensors(tables: Tables) -> dict[str, NDArray[Any]]:
    """Tables -> arrays for a safetensors file; the mirror of `from_tensors`."""
    return {field.name.split("_")[0]: np.ascontiguousarray(getattr(tables, field.name)) for field in fields(tables)}


def from_tensors(tensors: Mapping[str, NDArray[Any]], count: int) -> Tables:
    """Arrays -> tables of `count` rates. Raises BundleError when one is missing or of the wrong kind."""
    found = {}
    for name, (dtype, axes) in SHAPES.items():
        array = tensors.get(key := name.split("_")[0])
        if array is None or array.ndim != axes or array.dtype != dtype:
            what = "missing" if array is None else f"{array.dtype} of shape {array.shape}"
            raise BundleError(f"tensor {key} is {what}, expected {np.dtype(dtype)} with {axes} axes")
        found[name] = array
    if len(found["gain_RC"]) != count:
        raise BundleError(f"tables are for {len(found['gain_RC'])} rates, expected {count}")
    return Tables(**found)
