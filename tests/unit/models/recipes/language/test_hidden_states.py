from __future__ import annotations

import numpy as np
import pytest
import torch

from isthmus.models.language.checkpoint.checkpoint import Checkpoint
from isthmus.models.language.handoff.hidden_states import PREDICTOR_TOKENS, sizes
from isthmus.models.recipes.language.exits import Traces, trace
from isthmus.models.recipes.language.hidden_states import (
    EVENLY,
    gain_for,
    harm,
    token_pairs,
    two_ways,
    whitening,
)
from isthmus.models.recipes.language.llama import Llama
from isthmus.models.recipes.language.text import Texts
from tests.bench.tiny_llama import write_tiny_llama

HIDDEN, DEPTH = 64, 1


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Llama:
    folder = write_tiny_llama(tmp_path_factory.mktemp("models") / "tiny", layers=3)
    return Llama.load(Checkpoint.open(folder), torch.float32)


@pytest.fixture(scope="module")
def traces(model: Llama) -> Traces:
    rng = np.random.default_rng(0)
    texts = Texts.of([(rng.integers(3, 259, length).tolist(), length // 2) for length in (9, 12, 25)])
    return trace(model, texts, (DEPTH,), torch.float32)


def test_a_row_is_heard_by_later_ones_and_goes_up_by_itself(model: Llama) -> None:
    """Where both are the same rows, it is the layer's own; what changes one row goes one way each."""
    layer, x_1TH = model.layers[1], torch.randn(1, 6, HIDDEN, generator=torch.Generator().manual_seed(0))
    expected_1TH = layer(x_1TH)[0]
    for found_1TH in two_ways(layer, x_1TH, x_1TH):
        torch.testing.assert_close(found_1TH, expected_1TH)
    other_1TH = x_1TH.clone()
    other_1TH[0, 3] += 1
    _, heard_1TH = two_ways(layer, other_1TH, x_1TH)
    _, own_1TH = two_ways(layer, x_1TH, other_1TH)
    changed = [(found - expected_1TH)[0].abs().amax(1) > 1e-4 for found in (heard_1TH, own_1TH)]
    assert [each.tolist() for each in changed] == [[False] * 4 + [True] * 2, [False] * 3 + [True] + [False] * 2]


def test_harm_is_where_a_row_matters(model: Llama, traces: Traces) -> None:
    """As a matrix of squares; the same for the same seed."""
    harm_HH = harm(model, traces, range(len(traces)), DEPTH, 0)
    np.testing.assert_allclose(harm_HH, harm_HH.T, rtol=1e-4, atol=1e-6 * np.abs(harm_HH).max())
    assert np.linalg.eigvalsh(harm_HH).min() > -1e-5 * np.trace(harm_HH) and np.trace(harm_HH) > 0
    assert np.array_equal(harm_HH, harm(model, traces, range(len(traces)), DEPTH, 0))
    assert not np.array_equal(harm_HH, harm(model, traces, range(len(traces)), DEPTH, 1)), "tokens are drawn"


def test_whitened_components_are_uncorrelated_and_do_the_same_harm() -> None:
    rng = np.random.default_rng(0)
    rows_NH = (rng.normal(size=(500, HIDDEN)) @ rng.normal(size=(HIDDEN, HIDDEN))).astype(np.float32)
    factor_HH = rng.normal(size=(HIDDEN, HIDDEN)) * np.geomspace(1, 0.1, HIDDEN)
    harm_HH = (factor_HH @ factor_HH.T).astype(np.float32)
    matrix_CH = whitening(rows_NH, harm_HH).astype(np.float64)
    covariance_CC = (rows_NH @ matrix_CH.T).T @ (rows_NH @ matrix_CH.T)
    variance_C = np.diag(covariance_CC)
    assert np.all(np.diff(variance_C) <= 0)
    apart_CC = covariance_CC / np.sqrt(np.outer(variance_C, variance_C)) - np.eye(HIDDEN)
    assert np.abs(apart_CC).max() < 1e-2
    mean_harm_HH = harm_HH * HIDDEN / np.trace(harm_HH)
    weight_HH = matrix_CH.T @ matrix_CH  # the square root is of harm, and some in every direction
    roots_H, directions_HH = np.linalg.eigh(mean_harm_HH.astype(np.float64))
    np.testing.assert_allclose(weight_HH, (directions_HH * (roots_H + EVENLY)) @ directions_HH.T, atol=1e-3)


def test_pairs_are_of_the_token_before_and_of_the_rows_own(model: Llama, traces: Traces) -> None:
    places_N = torch.tensor([1, 8, 10])
    found_NT = token_pairs(model, traces, places_N)
    assert found_NT.shape == (3, PREDICTOR_TOKENS * HIDDEN)
    ids = traces.ids_N[torch.stack([places_N - 1, places_N], 1)]
    embedded_NKH = model.embedding_VH[ids].numpy()
    for pair_T, embedded_KH in zip(found_NT, embedded_NKH, strict=True):
        np.testing.assert_allclose(
            pair_T.reshape(PREDICTOR_TOKENS, HIDDEN), embedded_KH / sizes(embedded_KH), rtol=1e-5
        )


def test_a_gain_spends_what_it_may() -> None:
    latents_NC = np.random.default_rng(0).normal(size=(1000, 33)).astype(np.float32)
    gain = gain_for(latents_NC, 8.0)  # 2 bits for each of 32
    bits = 0.0
    for values_N in np.rint(latents_NC[:, :-1].T * gain):
        share = np.unique(values_N, return_counts=True)[1] / len(values_N)
        bits -= float((share * np.log2(share)).sum())
    assert bits / 8 == pytest.approx(8.0, rel=0.02)
