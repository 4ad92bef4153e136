"""Tables and integers for tests of the contextual codec."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from isthmus.models.codecs.checkerboard import ContextualCodec
from isthmus.models.codecs.context_model import ALL_CONTEXTS, ENDS, PHASES, Integers
from isthmus.models.codecs.tables import Tables

CAP = 1 << 16


def random_frequencies(rng: np.random.Generator, symbols: int) -> NDArray[np.int64]:
    """Skewed integer frequencies, each >= 1, that add up to 2**16."""
    mass = rng.dirichlet(np.full(symbols, rng.choice([0.05, 0.3, 3.0])))
    counts: NDArray[np.int64] = 1 + np.floor(mass * ((1 << 16) - symbols)).astype(np.int64)
    counts[rng.integers(symbols)] += (1 << 16) - counts.sum()
    return counts


def random_tables(seed: int, channels: int) -> Tables:
    """One to three rates, some channels silent; weights of any size."""
    rng = np.random.default_rng(seed)
    rates, bank, priors = int(rng.integers(1, 4)), int(rng.integers(1, 6)), int(rng.integers(1, 20))
    low_RC = rng.integers(-8, 5, (rates, channels)).astype(np.int8)
    high_RC = np.minimum(low_RC + rng.integers(0, 9, (rates, channels)), 8).astype(np.int8)
    rows = int((low_RC < high_RC).sum())
    tables = [random_frequencies(rng, int(rng.integers(30, 60))) for _ in range(bank)]
    return Tables(
        gain_RC=rng.uniform(0.1, 10, (rates, channels)).astype(np.float32),
        low_RC=low_RC,
        high_RC=high_RC,
        near_L2=rng.integers(0, 4, (rows, 2)).astype(np.uint8),
        slope_L=rng.integers(-40, 41, rows).astype(np.int16),
        bias_L2=rng.integers(-200, 400, (rows, PHASES)).astype(np.int16),
        ends_L24=rng.integers(-128, 128, (rows, PHASES, ENDS)).astype(np.int8),
        prior_LK=rng.integers(0, priors, (rows, ALL_CONTEXTS)).astype(np.uint8),
        table_E=np.sort(rng.integers(0, bank, priors)).astype(np.uint8),
        first_E=rng.integers(-20, -9, priors).astype(np.int16),
        lengths_T=np.array([len(table) for table in tables], np.uint16),
        frequencies=np.concatenate(tables).astype(np.uint16),
    )


def random_codec(seed: int, max_bytes: int = CAP) -> ContextualCodec:
    """A codec of one to four channels of up to seven rows and columns."""
    rng = np.random.default_rng(seed)
    shape_CHW = (int(rng.integers(1, 5)), int(rng.integers(1, 8)), int(rng.integers(1, 8)))
    return ContextualCodec(random_tables(seed, shape_CHW[0]), shape_CHW, max_bytes)


def random_integers(codec: ContextualCodec, rate: int, seed: int) -> Integers:
    """Integers that channels can take, near zero or anywhere."""
    rng, (low_C, high_C) = np.random.default_rng(seed), (codec.tables.low_RC[rate], codec.tables.high_RC[rate])
    wild_CHW = rng.laplace(0, rng.choice([0.3, 2.0, 50.0]), codec.shape_CHW)
    integers_CHW: Integers = np.clip(np.rint(wild_CHW), low_C[:, None, None], high_C[:, None, None]).astype(np.int32)
    return integers_CHW


def fixed_tables() -> Tables:
    """One rate; channels -2 .. 2, always 1, and 0 .. 1. Each neighbour is one context more."""
    bank = ([1000, 9000, 45_536, 9000, 1000], [60_000, 5536], [2000, 8000, 14_000, 17_536, 14_000, 8000, 2000])
    wide, narrow = [0] * 6 + [3, 3, 3, 3, 0, 0, 0, 0, 4, 4, 4, 4], [1] * 12 + [1, 1, 2, 2, 2, 2]
    return Tables(
        gain_RC=np.array([[1, 2, 4]], np.float32),
        low_RC=np.array([[-2, 1, 0]], np.int8),
        high_RC=np.array([[2, 1, 1]], np.int8),
        near_L2=np.array([[1, 1], [2, 1]], np.uint8),
        slope_L=np.array([16, 16], np.int16),
        bias_L2=np.array([[0, 96], [0, 0]], np.int16),
        ends_L24=np.array([[[16, 16, 16, 16], [0, 0, 0, 0]], [[0, 0, 0, 0], [16, 32, 0, -16]]], np.int8),
        prior_LK=np.array([wide, narrow], np.uint8),
        table_E=np.array([0, 1, 1, 2, 2], np.uint8),
        first_E=np.array([-2, 0, 0, -4, -2], np.int16),
        lengths_T=np.array([len(table) for table in bank], np.uint16),
        frequencies=np.concatenate(bank).astype(np.uint16),
    )


def fixed_codec(max_bytes: int = CAP) -> ContextualCodec:
    """Three channels of 3 x 5 integers."""
    return ContextualCodec(fixed_tables(), (3, 3, 5), max_bytes)


FIXED = np.array([0, 1, -1, 0, 2, -2, 0, 0, 0, 1, 0, -1, 0, 0, 0] + [1] * 15 + [0, 1, 0, 0, 0] * 3, np.int32).reshape(
    3, 3, 5
)
