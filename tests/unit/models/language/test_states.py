from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.errors import BundleError, InvalidInput, PayloadCorrupt, PayloadTooLarge
from models.language.packing import Floats
from models.language.states import StateCodec, components
from models.recipes.language_states import fit_states

HIDDEN, MOST = 24, 200
SIZES = (3.0, 6.0, 10.0)  # bytes a row


def rows(count: int, seed: int = 0) -> Floats:
    """Rows as a model has them: correlated, a few directions large, of very different sizes."""
    rng = np.random.default_rng(seed)
    mixing_HH = np.random.default_rng(99).normal(size=(HIDDEN, HIDDEN)) * np.geomspace(1, 0.01, HIDDEN)[:, None]
    sizes_N1 = np.exp(rng.normal(2, 1, (count, 1)))
    return np.asarray((rng.normal(size=(count, HIDDEN)) @ mixing_HH) * sizes_N1, np.float32)


@pytest.fixture(scope="module")
def tensors() -> dict[str, Any]:
    return fit_states(rows(2000), SIZES)


@pytest.fixture(scope="module")
def codec(tensors: dict[str, Any]) -> StateCodec:
    return StateCodec(tensors, HIDDEN, len(SIZES), MOST)


def error(codec: StateCodec, rate: int, rows_NH: Floats) -> float:
    back_NH = codec.decode(codec.encode(rows_NH, rate), rate)
    return float(np.median(np.linalg.norm(back_NH - rows_NH, axis=1) / np.linalg.norm(rows_NH, axis=1)))


def test_a_dearer_rate_is_nearer_to_the_row_and_takes_more(codec: StateCodec) -> None:
    fresh_NH = rows(200, seed=1)
    errors = [error(codec, rate, fresh_NH) for rate in codec.rates]
    sizes = [sum(map(len, codec.encode(fresh_NH, rate))) for rate in codec.rates]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.08 and errors[0] < 0.6
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1] / 2 < 200 * HIDDEN  # of 2 bytes each


def test_rows_are_coded_one_by_one(codec: StateCodec) -> None:
    fresh_NH = rows(5, seed=2)
    together = codec.encode(fresh_NH, 1)
    assert together == [codec.encode(row_H[None], 1)[0] for row_H in fresh_NH]
    # On some machines the bits of a product depend on how many rows it has.
    np.testing.assert_allclose(codec.decode(together[3:4], 1), codec.decode(together, 1)[3:4], rtol=1e-4, atol=1e-5)
    assert codec.encode(fresh_NH[:0], 1) == [] and codec.decode([], 1).shape == (0, HIDDEN)


def test_the_integers_come_back_as_they_were(codec: StateCodec) -> None:
    """What is decoded and coded again, gives the same bytes: nothing is lost twice."""
    payloads = codec.encode(rows(50, seed=3), 2)
    assert sum(a == b for a, b in zip(payloads, codec.encode(codec.decode(payloads, 2), 2), strict=True)) >= 45


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_rows_that_are_not_finite_are_refused(codec: StateCodec, value: float) -> None:
    fresh_NH = rows(2)
    fresh_NH[1, 3] = value
    with pytest.raises(InvalidInput, match="not finite"):
        codec.encode(fresh_NH, 0)


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e30])
def test_rows_of_any_size_cross(codec: StateCodec, scale: float) -> None:
    back_NH = codec.decode(codec.encode(rows(3) * np.float32(scale), 1), 1)
    assert np.isfinite(back_NH).all()


def test_the_cap_holds(tensors: dict[str, Any]) -> None:
    with pytest.raises(PayloadTooLarge, match="cap is 4"):
        StateCodec(tensors, HIDDEN, len(SIZES), 4).encode(rows(20), 2)


@given(st.binary(max_size=80), st.integers(0, 2))
@settings(max_examples=200, deadline=None)
def test_any_bytes_are_rows_or_an_error(codec: StateCodec, data: bytes, rate: int) -> None:
    with contextlib.suppress(PayloadCorrupt, PayloadTooLarge):
        assert np.isfinite(codec.decode([data], rate)).all()


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("basis", None),
        ("basis", np.zeros((HIDDEN, HIDDEN - 1), np.float32)),
        ("basis", np.zeros((HIDDEN, HIDDEN), np.int32)),
        ("middle", np.zeros(HIDDEN, np.float32)),
        ("gain", np.ones((3, HIDDEN), np.float32)),  # the size has a channel of its own
    ],
)
def test_tensors_that_do_not_fit_are_refused(tensors: dict[str, Any], name: str, array: Any) -> None:
    with pytest.raises(BundleError):
        StateCodec({**tensors, name: array}, HIDDEN, len(SIZES), MOST)


def test_components_hold_all_of_a_row(tensors: dict[str, Any]) -> None:
    fresh_NH, basis_CH = rows(10), tensors["basis"].astype(np.float32)
    latents_NC = components(fresh_NH, basis_CH, tensors["middle"].astype(np.float32))
    assert latents_NC.shape == (10, HIDDEN + 1)
    sizes_N = np.sqrt(np.mean(np.square(fresh_NH), axis=1))
    np.testing.assert_allclose(latents_NC[:, -1] + float(tensors["middle"][-1]), np.log2(sizes_N), atol=1e-3)
