from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.models.codecs.checkerboard import ContextualCodec
from isthmus.models.codecs.context_model import ALL_CONTEXTS, Checkerboard, ContextWeights, Integers
from isthmus.models.codecs.tables import Tables, check_tables
from isthmus.models.recipes.common.fit_bank import code_length, frequencies
from isthmus.models.recipes.common.fit_tables import count, fit

CAP = 1 << 16
SHAPE_CHW = (4, 9, 10)
GAIN_RC = np.array([[1, 1, 1, 1], [3, 3, 3, 3]], np.float32)


def latents(count: int, seed: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """Smooth random fields: small, one-sided, wide, and always zero."""
    rng = np.random.default_rng(seed)
    coarse = rng.normal(size=(count, *SHAPE_CHW))
    smooth = sum(np.roll(coarse, (y, x), (2, 3)) for y in (-1, 0, 1) for x in (-1, 0, 1)) / 3
    smooth *= np.array([0.6, 1, 1.5, 0])[:, None, None]
    smooth[:, 1] = np.abs(smooth[:, 1])
    smooth[:, 2, 0] += 5  # the first row is another world
    return smooth.astype(np.float32)


def quantised(count: int, seed: int) -> list[Integers]:
    """Integers of two rates."""
    return [np.rint(latents(count, seed) * gain_C[:, None, None]).astype(np.int32) for gain_C in GAIN_RC]


@pytest.fixture(scope="module")
def fitted() -> Tables:
    return fit(quantised(200, seed=0), GAIN_RC)


def code_bytes(codec: ContextualCodec, integers: list[Integers]) -> list[float]:
    """Mean ideal bytes of each rate; integers are clipped to what channels can take."""
    sizes = []
    for rate, of_rate in enumerate(integers):
        low_C, high_C = codec.tables.low_RC[rate].astype(np.int32), codec.tables.high_RC[rate].astype(np.int32)
        clipped = np.clip(of_rate, low_C[:, None, None], high_C[:, None, None])
        sizes.append(float(np.mean([codec.ideal_bits(one_CHW, rate) / 8 for one_CHW in clipped])))
    return sizes


def factorized_bytes(train: list[Integers], test: list[Integers]) -> list[float]:
    """The same under one table a channel."""
    sizes = []
    for of_train, of_test in zip(train, test, strict=True):
        bits = 0.0
        for channel in range(SHAPE_CHW[0]):
            low, high = of_train[:, channel].min() - 1, of_train[:, channel].max() + 1
            table = frequencies(np.bincount(of_train[:, channel].ravel() - low, minlength=high - low + 1).astype(float))
            bits -= np.log2(table[np.clip(of_test[:, channel], low, high) - low] / 65_536).sum()
        sizes.append(bits / 8 / len(of_test))
    return sizes


def test_tables_are_sound(fitted: Tables) -> None:
    check_tables(fitted, SHAPE_CHW[0])
    assert len(fitted.lengths_T) <= 24


def test_contexts_save_an_eighth_on_unseen_inputs(fitted: Tables) -> None:
    codec, unseen = ContextualCodec(fitted, SHAPE_CHW, CAP), quantised(50, seed=1)
    for ours, theirs in zip(code_bytes(codec, unseen), factorized_bytes(quantised(200, seed=0), unseen), strict=True):
        assert ours < 0.875 * theirs


def test_few_inputs_are_not_learnt_by_heart() -> None:
    few, unseen = fit(quantised(12, seed=0), GAIN_RC), quantised(50, seed=1)
    many = fit(quantised(200, seed=0), GAIN_RC)
    sizes = [code_bytes(ContextualCodec(tables, SHAPE_CHW, CAP), unseen) for tables in (few, many)]
    assert (np.array(sizes[0]) < 1.1 * np.array(sizes[1])).all()


def test_fitting_twice_gives_the_same_tables(fitted: Tables) -> None:
    again = fit(quantised(200, seed=0), GAIN_RC)
    for field in dataclasses.fields(Tables):
        np.testing.assert_array_equal(getattr(again, field.name), getattr(fitted, field.name))


def test_every_integer_seen_can_be_coded_in_any_context(fitted: Tables) -> None:
    codec = ContextualCodec(fitted, SHAPE_CHW, CAP)
    rng = np.random.default_rng(0)
    for rate, of_rate in enumerate(quantised(200, seed=0)):
        low_C, high_C = of_rate.min((0, 2, 3)), of_rate.max((0, 2, 3))
        for _ in range(20):
            shuffled_CHW = rng.integers(low_C[:, None, None], high_C[:, None, None] + 1, SHAPE_CHW).astype(np.int32)
            np.testing.assert_array_equal(codec.decode(codec.encode(shuffled_CHW, rate), rate), shuffled_CHW)


def test_ranges_are_one_wider_than_what_was_seen(fitted: Tables) -> None:
    for rate, of_rate in enumerate(quantised(200, seed=0)):
        np.testing.assert_array_equal(fitted.low_RC[rate, :3], of_rate.min((0, 2, 3))[:3] - 1)
        np.testing.assert_array_equal(fitted.high_RC[rate, :3], of_rate.max((0, 2, 3))[:3] + 1)


def test_a_channel_that_never_changes_is_silent(fitted: Tables) -> None:
    assert (fitted.low_RC[:, 3] == 0).all()
    assert (fitted.high_RC[:, 3] == 0).all()
    assert len(fitted.prior_LK) == 6


def test_a_rate_may_be_silent() -> None:
    integers = quantised(20, seed=0)
    tables = fit([np.full_like(integers[0], 2), integers[1]], GAIN_RC)
    codec = ContextualCodec(tables, SHAPE_CHW, CAP)
    assert codec.encode(np.full(SHAPE_CHW, 2, np.int32), 0) == b""


def test_there_must_be_something_to_fit() -> None:
    with pytest.raises(ValueError, match="every channel is silent at every rate"):
        fit([np.zeros((3, *SHAPE_CHW), np.int32)], GAIN_RC[:1])


def test_integers_beyond_8_bits_are_clipped() -> None:
    integers = [100 * of_rate for of_rate in quantised(20, seed=0)]
    tables = fit(integers, GAIN_RC)
    check_tables(tables, SHAPE_CHW[0])
    assert tables.high_RC.max() == 127
    assert tables.low_RC.min() == -127


@given(seed=st.integers(0, 1 << 32))
def test_anything_can_be_fitted(seed: int) -> None:
    rng = np.random.default_rng(seed)
    shape_CHW = (int(rng.integers(1, 4)), int(rng.integers(1, 6)), int(rng.integers(1, 6)))
    shape = (int(rng.integers(1, 5)), *shape_CHW)
    integers = [np.rint(rng.standard_cauchy(shape) * scale).astype(np.int32) for scale in (1, 10)]
    gain_RC = np.ones((2, shape_CHW[0]), np.float32)
    if all((of_rate == of_rate[:1, :, :1, :1]).all() for of_rate in integers):
        return
    tables = fit(integers, gain_RC, bank=int(rng.integers(1, 6)))
    codec = ContextualCodec(tables, shape_CHW, CAP)
    for rate, of_rate in enumerate(integers):
        clipped_CHW = np.clip(
            of_rate[0], tables.low_RC[rate][:, None, None], tables.high_RC[rate][:, None, None]
        ).astype(np.int32)
        np.testing.assert_array_equal(codec.decode(codec.encode(clipped_CHW, rate), rate), clipped_CHW)


def test_many_modes_still_leave_few_enough_priors() -> None:
    rng = np.random.default_rng(0)
    centre_C11 = np.linspace(-120, 120, 35)[:, None, None]
    drawn = rng.normal(size=(20, 35, 1, 1)) * 4 + rng.normal(size=(20, 35, 6, 6)) * rng.uniform(0.3, 3, (35, 1, 1))
    tables = fit([np.rint(centre_C11 + drawn).astype(np.int32)], np.ones((1, 35), np.float32))
    check_tables(tables, 35)
    assert len(tables.table_E) <= 255
    assert tables.prior_LK.shape == (35, ALL_CONTEXTS)


def test_tables_are_in_the_order_of_what_they_cost(fitted: Tables) -> None:
    bits = [code_length(table.astype(np.float64)) for table in fitted.bank()]
    assert bits == sorted(bits)


def test_contexts_never_seen_take_after_their_channel() -> None:
    integers_NCHW = np.array([[[[2, 3, 3, 3]]], [[[3, 3, 3, 4]]]], np.int8)
    flat = ContextWeights(
        low_C=np.array([2], np.int8),
        high_C=np.array([4], np.int8),
        near_C2=np.ones((1, 2), np.uint8),
        slope_C=np.zeros(1, np.int16),
        bias_C2=np.zeros((1, 2), np.int16),
        ends_C24=np.zeros((1, 2, 4), np.int8),
    )
    counts_KA = count(Checkerboard((1, 1, 4), [0]), integers_NCHW, flat, 2, 4)
    seen = np.isin(np.arange(ALL_CONTEXTS), [0, 6])
    np.testing.assert_allclose(counts_KA[~seen] / counts_KA[~seen].sum(1, keepdims=True), [[1 / 8, 6 / 8, 1 / 8]] * 16)
    np.testing.assert_allclose(counts_KA[0] / counts_KA[6], [(1 + 1 / 8) / (1 / 8), 1, (1 / 8) / (1 + 1 / 8)])


def test_very_many_histograms_are_grouped_by_what_they_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nearly as short as with all of them compared, and every integer still has its place."""
    integers, fresh = quantised(100, seed=0), quantised(20, seed=1)
    merged = fit(integers, GAIN_RC)
    monkeypatch.setattr("isthmus.models.recipes.common.fit_bank.MOST_MERGED", 0)
    graded = fit(integers, GAIN_RC)
    check_tables(graded, SHAPE_CHW[0])
    bits = [
        sum(ContextualCodec(tables, SHAPE_CHW, CAP).ideal_bits(each, 1) for each in fresh[1])
        for tables in (merged, graded)
    ]
    assert bits[1] < 1.05 * bits[0]
