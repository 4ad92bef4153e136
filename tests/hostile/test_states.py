"""Hostile payloads of hidden states: any bytes decode to finite values or raise one of our errors."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.models.errors import CallerError
from isthmus.models.language.checkpoint.checkpoint import Checkpoint
from isthmus.models.language.handoff.bundle import HandoffBundle
from isthmus.models.language.handoff.hidden_states import StateCodec
from tests.bench.tiny_llama import write_tiny_llama
from tests.tiny_handoff import MAX_STATE_BYTES, write_tiny_handoff

HIDDEN = 64
EMBEDDED_2H = np.random.default_rng(0).normal(size=(2, HIDDEN)).astype(np.float32)


@pytest.fixture(scope="module")
def codec(tmp_path_factory: pytest.TempPathFactory) -> StateCodec:
    folder = tmp_path_factory.mktemp("states")
    model = Checkpoint.open(write_tiny_llama(folder / "model", hidden=HIDDEN, ffn=64, context=64))
    return HandoffBundle.open(write_tiny_handoff(folder / "handoff", model), model).state_codec


def survive(codec: StateCodec, data: bytes, rate: int) -> None:
    try:
        state_1H = codec.decode([data], EMBEDDED_2H, rate)
    except CallerError:
        return
    assert state_1H.shape == (1, HIDDEN) and np.isfinite(state_1H).all()


@given(data=st.binary(max_size=MAX_STATE_BYTES + 8), rate=st.integers(-1, 3))
def test_random_bytes(codec: StateCodec, data: bytes, rate: int) -> None:
    survive(codec, data, rate)


@given(seed=st.integers(0, 99), bit=st.integers(0, 8 * MAX_STATE_BYTES), cut=st.integers(0, 20))
def test_flipped_bits_and_cut_ends(codec: StateCodec, seed: int, bit: int, cut: int) -> None:
    state_1H = np.random.default_rng(seed).normal(size=(1, HIDDEN)).astype(np.float32)
    data = bytearray(codec.encode(state_1H, EMBEDDED_2H, 1)[0])
    data[bit // 8 % len(data)] ^= 1 << bit % 8
    survive(codec, bytes(data[: len(data) - cut]), 1)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_states_that_are_not_finite_are_not_sent(codec: StateCodec, value: float) -> None:
    state_1H = np.zeros((1, HIDDEN), np.float32)
    state_1H[0, 3] = value
    with pytest.raises(CallerError, match="not finite"):
        codec.encode(state_1H, EMBEDDED_2H, 0)


@pytest.mark.parametrize("scale", [0.0, 1e-38, 1e18])
def test_states_of_any_size_are_sent(codec: StateCodec, scale: float) -> None:
    state_1H = np.full((1, HIDDEN), scale, np.float32)
    assert np.isfinite(codec.decode(codec.encode(state_1H, EMBEDDED_2H, 1), EMBEDDED_2H, 1)).all()


@pytest.mark.parametrize("scale", [0.0, 1e-38, 1e18])
def test_embeddings_of_any_size_are_accepted(codec: StateCodec, scale: float) -> None:
    state_1H, embedded_2H = np.ones((1, HIDDEN), np.float32), EMBEDDED_2H * np.float32(scale)
    assert np.isfinite(codec.decode(codec.encode(state_1H, embedded_2H, 1), embedded_2H, 1)).all()
