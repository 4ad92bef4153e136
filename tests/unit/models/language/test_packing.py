"""Matrices of a few bits as bundles store them: how far they are from the originals, golden bytes, what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as nps

from isthmus.models.errors import BundleError
from isthmus.models.language.packing import STORED_BLOCK, Floats, packed, unpacked

matrices = st.tuples(st.integers(1, 3), st.integers(1, 3)).flatmap(
    lambda shape: nps.arrays(
        np.float32, (shape[0], shape[1] * STORED_BLOCK), elements=st.floats(-100, 100, width=32), fill=st.just(0.0)
    )
)


@given(weight_OI=matrices, bits=st.integers(2, 8))
def test_no_weight_is_farther_off_than_clipping_and_half_a_step(bits: int, weight_OI: Floats) -> None:
    stored = packed(weight_OI, "w", bits)
    rows, groups = len(weight_OI), weight_OI.shape[1] // STORED_BLOCK
    assert stored["w.codes"].shape == (rows, groups, 8 * bits) and stored["w.scale"].shape == (rows, groups)
    largest_OG = np.abs(weight_OI.reshape(rows, groups, STORED_BLOCK)).max(-1)
    off_OG = np.abs(unpacked(stored, "w") - weight_OI).reshape(rows, groups, STORED_BLOCK).max(-1)
    assert (off_OG <= largest_OG * (0.41 + 1 / (2**bits - 1)) + 1e-4).all()


@pytest.mark.parametrize(("bits", "most"), [(8, 0.01), (5, 0.05), (4, 0.11), (3, 0.2), (2, 0.37)])
def test_normal_weights_lose_what_a_uniform_quantiser_must(bits: int, most: float) -> None:
    weight_OI = np.random.default_rng(0).normal(size=(40, 640)).astype(np.float32)
    error = np.sqrt(np.square(unpacked(packed(weight_OI, "w", bits), "w") - weight_OI).mean())
    assert error < most


def test_zeros_stay_zeros() -> None:
    assert not unpacked(packed(np.zeros((2, 128), np.float32), "w", 3), "w").any()


def test_golden_bytes() -> None:
    """Codes are written one after another, the highest bit first."""
    weight_OI = np.tile(np.arange(-3.5, 4, dtype=np.float32), STORED_BLOCK // 8)[None]
    stored = packed(weight_OI, "w", 3)
    assert stored["w.scale"].tolist() == [[1.0]]
    assert stored["w.codes"][0, 0].tolist() == [0b00000101, 0b00111001, 0b01110111] * 8
    assert np.array_equal(unpacked(stored, "w"), weight_OI)


def test_what_is_not_such_a_matrix_is_refused() -> None:
    with pytest.raises(BundleError, match="65 columns.*multiple of 64"):
        packed(np.zeros((1, 65), np.float32), "w", 3)
    stored = packed(np.ones((2, 128), np.float32), "w", 3)
    for name, array, message in (
        ("w.codes", np.zeros((2, 2, 24), np.int8), "w.codes is missing or not uint8"),
        ("w.codes", np.zeros((2, 1, 24), np.uint8), "w.codes is missing or not uint8"),
        ("w.codes", np.zeros((2, 2, 25), np.uint8), "25 bytes a block"),
        ("w.codes", np.zeros((2, 2, 8), np.uint8), "8 bytes a block"),
        ("w.codes", np.zeros((2, 2, 72), np.uint8), "72 bytes a block"),
        ("w.scale", np.zeros((2, 2), np.uint8), "w.scale is uint8"),
        ("w.scale", np.zeros(2, np.float16), "w.scale is float16 of shape"),
    ):
        with pytest.raises(BundleError, match=message):
            unpacked({**stored, name: array}, "w")
    with pytest.raises(BundleError, match="w.codes is missing"):
        unpacked({"w.scale": stored["w.scale"]}, "w")
