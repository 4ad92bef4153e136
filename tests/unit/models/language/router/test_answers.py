"""Scores of whole answers from likelihoods."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.models.errors import BundleError
from isthmus.models.language.router.answers import (
    ANSWER_FEATURES,
    CUT,
    ENDED,
    QUERY_FEATURES,
    RUNNING,
    AnswerFeatures,
    AnswerVerifier,
    LogisticHead,
    is_due,
    least_score,
    token_likelihoods,
)
from isthmus.models.language.sampling import log_softmax

VOCAB = 11


def features(ids: list[int], seed: int = 0, prompt: int = 5) -> AnswerFeatures:
    made, generator = AnswerFeatures(prompt), np.random.default_rng(seed)
    for id_ in ids:
        made.add(generator.standard_normal(VOCAB).astype(np.float32), id_)
    return made


@given(st.lists(st.floats(-50, 50, width=32), min_size=2, max_size=20), st.integers(0, 1))
def test_likelihoods_are_those_of_the_softmax(logits: list[float], token: int) -> None:
    logits_V = np.array(logits, np.float32)
    logs_V = log_softmax(logits_V)
    logprob, entropy, margin = token_likelihoods(logits_V, token)
    second, first = np.sort(logs_V)[-2:]
    assert logprob == pytest.approx(float(logs_V[token]), abs=1e-9)
    assert entropy == pytest.approx(float(-(np.exp(logs_V) * logs_V).sum()), abs=1e-9)
    assert margin == pytest.approx(float(first - second), abs=1e-9)


def test_features_of_an_answer() -> None:
    made = features([1, 2, 3, 1, 2, 3])
    query_E, answer_E = made.query_features(), made.features(ENDED)
    assert query_E.shape == (QUERY_FEATURES,) and answer_E.shape == (ANSWER_FEATURES,)
    assert (answer_E[:QUERY_FEATURES] == query_E).all() and query_E[3] == pytest.approx(math.log(6))
    assert answer_E[-3] == pytest.approx(math.log(7)) and answer_E[-2] == ENDED
    assert answer_E[-1] == pytest.approx(1 / 6), "1 2 3 comes twice"
    assert np.isfinite(features([4]).features(CUT)).all()


def test_a_score_is_the_least_of_its_running_scores() -> None:
    generator = np.random.default_rng(1)
    heads = [LogisticHead(generator.standard_normal(n).astype(np.float32), 0.1) for n in (4, ANSWER_FEATURES)]
    verifier = AnswerVerifier(*heads)
    made, checks, running = AnswerFeatures(3), [], []
    for index in range(20):
        made.add(generator.standard_normal(VOCAB).astype(np.float32), index % 3)
        state = ENDED if index == 19 else RUNNING
        if is_due(len(made), state):
            checks.append(made.features(state))
            running.append(verifier.running_score(made, state))
    assert len(checks) == 3 and least_score(verifier, checks) == pytest.approx(min(running))
    assert 0 < verifier.query_score(made) < 1


def test_heads_are_stored_and_read() -> None:
    verifier = AnswerVerifier(
        LogisticHead(np.ones(QUERY_FEATURES, np.float32), 0.5), LogisticHead(np.ones(ANSWER_FEATURES, np.float32), -1)
    )
    read = AnswerVerifier.from_tensors(verifier.tensors())
    assert read.query.bias == 0.5 and (read.answer.weight_E == 1).all()
    for broken in ({}, {**verifier.tensors(), "query.weight": np.ones(3, np.float32)}):
        with pytest.raises(BundleError, match=r"query\.(weight|\*)"):
            AnswerVerifier.from_tensors(broken)
