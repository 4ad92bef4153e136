"""Features of a confidence head, and its predictions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from isthmus.models.errors import BundleError
from isthmus.models.language.handoff.confidence_head import FEATURES, ConfidenceHead, features, ngram_repeats

RNG = np.random.default_rng(0)
TENSORS = {
    "judge.0.weight": RNG.normal(size=(5, FEATURES)).astype(np.float32),
    "judge.0.bias": RNG.normal(size=5).astype(np.float32),
    "judge.2.weight": RNG.normal(size=(1, 5)).astype(np.float32),
    "judge.2.bias": np.array([0.3], np.float32),
}


def test_features_and_prediction_are_pytorchs() -> None:
    logits_V = (9 * RNG.normal(size=259)).astype(np.float32)
    log_V = torch.from_numpy(logits_V).log_softmax(0)
    text = [1, int(logits_V.argmax()), 1]
    expected = [*log_V.topk(4).values.tolist(), float(-(log_V.exp() * log_V).sum()), 1, 0, 0]
    np.testing.assert_allclose(features(logits_V, text), expected, rtol=1e-4)
    tensors = {name: torch.from_numpy(array) for name, array in TENSORS.items()}
    features_E = torch.from_numpy(features(logits_V, text))
    hidden_F = torch.relu(tensors["judge.0.weight"] @ features_E + tensors["judge.0.bias"])
    likely = torch.sigmoid(tensors["judge.2.weight"] @ hidden_F + tensors["judge.2.bias"]).item()
    assert ConfidenceHead.from_tensors(TENSORS)(logits_V, text) == pytest.approx(likely, rel=1e-4)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ([5], [0, 0, 0]),
        ([5, 6], [0, 0, 0]),
        ([5, 5], [-1, 0, 0]),
        ([5, 7, 5], [1, 0, 0]),
        ([5, 7, 5, 8, 5], [-1, 0, 0]),
        ([4, 5, 7, 5, 8, 4, 5], [-1, 1, 0]),
        ([3, 4, 5, 7, 4, 5, 8, 3, 4, 5], [-1, -1, 1]),
        ([3, 4, 5, 3, 4, 5], [-1, -1, -1]),
        ([7, 7, 7, 7], [1, 1, 1]),
    ],
)
def test_ngram_repeats_are_of_the_last_occurrence(text: list[int], found: list[float]) -> None:
    assert ngram_repeats(text, 7) == found


@given(text=st.lists(st.integers(0, 3), min_size=1, max_size=30), choice=st.integers(0, 3))
def test_ngram_repeats_are_what_a_search_finds(text: list[int], choice: int) -> None:
    for count, found in enumerate(ngram_repeats(text, choice), 1):
        tail = text[-count:]
        places = [end for end in range(count, len(text)) if text[end - count : end] == tail]
        expected = 0 if not places or len(text) < count else 1 if text[places[-1]] == choice else -1
        assert found == expected


def test_a_batch_is_predicted_as_each_alone() -> None:
    features_NE = RNG.normal(size=(7, FEATURES)).astype(np.float32)
    head = ConfidenceHead.from_tensors(TENSORS)
    np.testing.assert_allclose(
        head.predict(features_NE), [head.predict(features_E) for features_E in features_NE], rtol=1e-5
    )


@pytest.mark.parametrize(
    ("name", "shape"),
    [("judge.0.weight", (5, 2)), ("judge.0.bias", (4,)), ("judge.2.weight", (2, 5)), ("judge.2.bias", (2,))],
)
def test_broken_tensors_are_refused(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(BundleError, match="judge"):
        ConfidenceHead.from_tensors({**TENSORS, name: np.zeros(shape, np.float32)})
    with pytest.raises(BundleError, match="missing"):
        ConfidenceHead.from_tensors({})
