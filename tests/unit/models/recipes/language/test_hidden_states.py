from __future__ import annotations

import numpy as np
import pytest
import torch

from isthmus.models.language.checkpoint.checkpoint import Checkpoint
from isthmus.models.language.handoff.hidden_states import PREDICTOR_TOKENS, root_mean_square
from isthmus.models.recipes.language.corpus import Corpus
from isthmus.models.recipes.language.hidden_states import (
    UNIFORM_SHARE,
    gain_for,
    inputs_at,
    sensitivity,
    two_paths,
    whitening,
)
from isthmus.models.recipes.language.llama import Llama
from isthmus.models.recipes.language.teacher import TeacherOutputs, run_teacher
from tests.bench.tiny_llama import write_tiny_llama

HIDDEN, DEPTH = 64, 1


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Llama:
    folder = write_tiny_llama(tmp_path_factory.mktemp("models") / "tiny", layers=3)
    return Llama.load(Checkpoint.open(folder), torch.float32)


@pytest.fixture(scope="module")
def teacher(model: Llama) -> TeacherOutputs:
    rng = np.random.default_rng(0)
    corpus = Corpus.from_sequences([(rng.integers(3, 259, length).tolist(), length // 2) for length in (9, 12, 25)])
    return run_teacher(model, corpus, (DEPTH,), torch.float32)


def test_a_hidden_state_is_attended_to_on_one_path_and_goes_up_on_the_other(model: Llama) -> None:
    """Equal versions give the layer's own output; a change in one version takes one path."""
    layer, x_1TH = model.layers[1], torch.randn(1, 6, HIDDEN, generator=torch.Generator().manual_seed(0))
    expected_1TH = layer(x_1TH)[0]
    for found_1TH in two_paths(layer, x_1TH, x_1TH):
        torch.testing.assert_close(found_1TH, expected_1TH)
    other_1TH = x_1TH.clone()
    other_1TH[0, 3] += 1
    _, attended_1TH = two_paths(layer, other_1TH, x_1TH)
    _, own_1TH = two_paths(layer, x_1TH, other_1TH)
    changed = [(found - expected_1TH)[0].abs().amax(1) > 1e-4 for found in (attended_1TH, own_1TH)]
    assert [each.tolist() for each in changed] == [[False] * 4 + [True] * 2, [False] * 3 + [True] + [False] * 2]


def test_sensitivity_is_a_repeatable_matrix_of_squares(model: Llama, teacher: TeacherOutputs) -> None:
    sensitivity_HH = sensitivity(model, teacher, range(len(teacher)), DEPTH, 0)
    np.testing.assert_allclose(sensitivity_HH, sensitivity_HH.T, rtol=1e-4, atol=1e-6 * np.abs(sensitivity_HH).max())
    assert np.linalg.eigvalsh(sensitivity_HH).min() > -1e-5 * np.trace(sensitivity_HH) and np.trace(sensitivity_HH) > 0
    assert np.array_equal(sensitivity_HH, sensitivity(model, teacher, range(len(teacher)), DEPTH, 0))
    assert not np.array_equal(sensitivity_HH, sensitivity(model, teacher, range(len(teacher)), DEPTH, 1)), (
        "tokens are sampled"
    )


def test_whitened_components_are_uncorrelated_and_equally_sensitive() -> None:
    rng = np.random.default_rng(0)
    states_NH = (rng.normal(size=(500, HIDDEN)) @ rng.normal(size=(HIDDEN, HIDDEN))).astype(np.float32)
    factor_HH = rng.normal(size=(HIDDEN, HIDDEN)) * np.geomspace(1, 0.1, HIDDEN)
    sensitivity_HH = (factor_HH @ factor_HH.T).astype(np.float32)
    matrix_CH = whitening(states_NH, sensitivity_HH).astype(np.float64)
    covariance_CC = (states_NH @ matrix_CH.T).T @ (states_NH @ matrix_CH.T)
    variance_C = np.diag(covariance_CC)
    assert np.all(np.diff(variance_C) <= 0)
    apart_CC = covariance_CC / np.sqrt(np.outer(variance_C, variance_C)) - np.eye(HIDDEN)
    assert np.abs(apart_CC).max() < 1e-2
    normed_HH = sensitivity_HH * HIDDEN / np.trace(sensitivity_HH)
    weight_HH = matrix_CH.T @ matrix_CH  # the square of a root of the sensitivity plus the uniform share
    roots_H, directions_HH = np.linalg.eigh(normed_HH.astype(np.float64))
    np.testing.assert_allclose(weight_HH, (directions_HH * (roots_H + UNIFORM_SHARE)) @ directions_HH.T, atol=1e-3)


def test_predictor_inputs_are_of_the_token_before_and_of_the_states_own(model: Llama, teacher: TeacherOutputs) -> None:
    positions_N = torch.tensor([1, 8, 10])
    found_NT = inputs_at(model, teacher, positions_N)
    assert found_NT.shape == (3, PREDICTOR_TOKENS * HIDDEN)
    ids = teacher.ids_N[torch.stack([positions_N - 1, positions_N], 1)]
    embedded_NKH = model.embedding_VH[ids].numpy()
    for pair_T, embedded_KH in zip(found_NT, embedded_NKH, strict=True):
        np.testing.assert_allclose(
            pair_T.reshape(PREDICTOR_TOKENS, HIDDEN), embedded_KH / root_mean_square(embedded_KH), rtol=1e-5
        )


def test_a_gain_meets_its_target_size() -> None:
    latents_NC = np.random.default_rng(0).normal(size=(1000, 33)).astype(np.float32)
    gain = gain_for(latents_NC, 8.0)  # 2 bits for each of 32
    bits = 0.0
    for values_N in np.rint(latents_NC[:, :-1].T * gain):
        share = np.unique(values_N, return_counts=True)[1] / len(values_N)
        bits -= float((share * np.log2(share)).sum())
    assert bits / 8 == pytest.approx(8.0, rel=0.02)
