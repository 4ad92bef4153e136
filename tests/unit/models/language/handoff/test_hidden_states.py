from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.models.errors import BundleError, InvalidInput, PayloadCorrupt, PayloadTooLarge
from isthmus.models.language.handoff.hidden_states import StateCodec, Transform, predictor_inputs
from isthmus.models.language.packing import Floats, packed, unpacked
from isthmus.models.recipes.language.hidden_states import fit_states

HIDDEN, MOST = 64, 200
SIZES = (6.0, 12.0, 24.0)  # bytes of a hidden state
PREDICTED = 0.6  # share of a hidden state that its tokens predict


class States(NamedTuple):
    """Hidden states (N, HIDDEN) like a model's, and embeddings (N + 1, HIDDEN) of their tokens and the one before."""

    states_NH: Floats
    embedded_MH: Floats


def random_states(count: int, seed: int = 0) -> States:
    """Correlated, with a few large directions and very different magnitudes; partly predicted by their tokens."""
    rng, fixed = np.random.default_rng(seed), np.random.default_rng(99)
    mixing_HH = fixed.normal(size=(HIDDEN, HIDDEN)) * np.geomspace(1, 0.01, HIDDEN)[:, None]
    predicting_TH = fixed.normal(size=(2 * HIDDEN, HIDDEN)) * PREDICTED / HIDDEN**0.5
    embedded_MH = rng.normal(size=(count + 1, HIDDEN)).astype(np.float32)
    own_NH = rng.normal(size=(count, HIDDEN)) @ mixing_HH
    shapes_NH = own_NH + predictor_inputs(embedded_MH[:-1], embedded_MH[1:]) @ predicting_TH
    return States(np.asarray(shapes_NH * np.exp(rng.normal(2, 1, (count, 1))), np.float32), embedded_MH)


@pytest.fixture(scope="module")
def tensors() -> dict[str, Any]:
    states_NH, embedded_MH = random_states(2000)
    return fit_states(
        states_NH, predictor_inputs(embedded_MH[:-1], embedded_MH[1:]), np.eye(HIDDEN, dtype=np.float32), SIZES
    )


@pytest.fixture(scope="module")
def codec(tensors: dict[str, Any]) -> StateCodec:
    return StateCodec(tensors, HIDDEN, len(SIZES), MOST)


def there_and_back(codec: StateCodec, fresh: States, rate: int) -> Floats:
    return codec.decode(codec.encode(*fresh, rate), fresh.embedded_MH, rate)


def error(codec: StateCodec, rate: int, fresh: States) -> float:
    back_NH = there_and_back(codec, fresh, rate)
    return float(np.median(np.linalg.norm(back_NH - fresh.states_NH, axis=1) / np.linalg.norm(fresh.states_NH, axis=1)))


def test_a_higher_rate_is_more_exact_and_larger(codec: StateCodec) -> None:
    fresh = random_states(200, seed=1)
    errors = [error(codec, rate, fresh) for rate in codec.rates]
    sizes = [sum(map(len, codec.encode(*fresh, rate))) for rate in codec.rates]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.08 and errors[0] < 0.6
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1] / 2 < 200 * HIDDEN  # of 2 bytes each


def test_what_tokens_predict_is_not_sent(codec: StateCodec) -> None:
    """With the embeddings of other tokens the same hidden states are coded as well, and take more bytes."""
    fresh, strange_MH = random_states(200, seed=4), random_states(200, seed=5).embedded_MH
    others = States(fresh.states_NH, strange_MH)
    assert error(codec, 2, others) < 3 * error(codec, 2, fresh)
    sizes = [sum(map(len, codec.encode(*each, 2))) for each in (fresh, others)]
    assert sizes[0] < 0.95 * sizes[1]


def test_embeddings_that_differ_a_little_at_both_ends_do_little(codec: StateCodec) -> None:
    """A device has them in 8 bits, the cloud in 16."""
    fresh = random_states(50, seed=6)
    payloads = codec.encode(*fresh, 2)
    near_MH = fresh.embedded_MH * np.random.default_rng(0).uniform(0.99, 1.01, fresh.embedded_MH.shape)
    there_NH, here_NH = (codec.decode(payloads, each, 2) for each in (fresh.embedded_MH, near_MH.astype(np.float32)))
    apart_N = np.linalg.norm(there_NH - here_NH, axis=1) / np.linalg.norm(there_NH, axis=1)
    assert 0 < apart_N.max() < 0.02


def test_states_are_coded_one_by_one(codec: StateCodec) -> None:
    fresh = random_states(5, seed=2)
    together = codec.encode(*fresh, 1)
    alone = [codec.encode(fresh.states_NH[n : n + 1], fresh.embedded_MH[n : n + 2], 1)[0] for n in range(5)]
    assert together == alone
    # On some machines the bits of a product depend on how many rows it has.
    fourth_1H = codec.decode(together[3:4], fresh.embedded_MH[3:5], 1)
    np.testing.assert_allclose(fourth_1H, there_and_back(codec, fresh, 1)[3:4], rtol=1e-4, atol=1e-4)
    none = States(fresh.states_NH[:0], fresh.embedded_MH[:1])
    assert codec.encode(*none, 1) == [] and codec.decode([], none.embedded_MH, 1).shape == (0, HIDDEN)


def test_the_integers_come_back_as_they_were(codec: StateCodec) -> None:
    """What is decoded and coded again, gives the same bytes: nothing is lost twice."""
    fresh = random_states(50, seed=3)
    payloads = codec.encode(*fresh, 2)
    again = codec.encode(codec.decode(payloads, fresh.embedded_MH, 2), fresh.embedded_MH, 2)
    assert sum(a == b for a, b in zip(payloads, again, strict=True)) >= 45


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_states_that_are_not_finite_are_refused(codec: StateCodec, value: float) -> None:
    fresh = random_states(2)
    fresh.states_NH[1, 3] = value
    with pytest.raises(InvalidInput, match="not finite"):
        codec.encode(*fresh, 0)


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e30])
def test_states_of_any_size_are_coded(codec: StateCodec, scale: float) -> None:
    fresh = random_states(3)
    assert np.isfinite(there_and_back(codec, fresh._replace(states_NH=fresh.states_NH * np.float32(scale)), 1)).all()


def test_the_cap_holds(tensors: dict[str, Any]) -> None:
    with pytest.raises(PayloadTooLarge, match="cap is 4"):
        StateCodec(tensors, HIDDEN, len(SIZES), 4).encode(*random_states(20), 2)


@given(st.binary(max_size=80), st.integers(0, 2))
@settings(max_examples=200, deadline=None)
def test_any_bytes_are_states_or_an_error(codec: StateCodec, data: bytes, rate: int) -> None:
    with contextlib.suppress(PayloadCorrupt, PayloadTooLarge):
        assert np.isfinite(codec.decode([data], random_states(1).embedded_MH, rate)).all()


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"transform.scale": None}, "transform.scale is missing"),
        (packed(np.zeros((HIDDEN, HIDDEN), np.float32), "transform", 4), "no inverse"),
        (packed(np.eye(HIDDEN - 1, HIDDEN, dtype=np.float32), "transform", 4), "the model 64 hidden values"),
        (packed(np.eye(HIDDEN, dtype=np.float32), "predictor", 4), "the model 64 hidden values"),
        ({"middle": np.zeros(HIDDEN, np.float32)}, "the model 64 hidden values"),
        ({"gain": np.ones((3, HIDDEN), np.float32)}, "channels"),  # the size has a channel of its own
    ],
)
def test_tensors_that_do_not_fit_are_refused(tensors: dict[str, Any], changed: dict[str, Any], words: str) -> None:
    with pytest.raises(BundleError, match=words):
        StateCodec({**tensors, **changed}, HIDDEN, len(SIZES), MOST)


def test_latents_hold_all_of_a_hidden_state(tensors: dict[str, Any]) -> None:
    fresh = random_states(10)
    middle_H1, inputs_NT = (
        tensors["middle"].astype(np.float32),
        predictor_inputs(fresh.embedded_MH[:-1], fresh.embedded_MH[1:]),
    )
    transform = Transform.of(unpacked(tensors, "transform"), middle_H1, unpacked(tensors, "predictor"))
    latents_NC = transform.latents(fresh.states_NH, inputs_NT)
    assert latents_NC.shape == (10, HIDDEN + 1)
    sizes_N = np.sqrt(np.mean(np.square(fresh.states_NH), axis=1))
    np.testing.assert_allclose(latents_NC[:, -1] + middle_H1[-1], np.log2(sizes_N), atol=1e-3)
    np.testing.assert_allclose(transform.hidden_states(latents_NC, inputs_NT), fresh.states_NH, rtol=1e-3, atol=1e-3)
