from __future__ import annotations

import math

import numpy as np
import pytest

from isthmus.models.vision.exit_score import exit_score, features, sigmoid
from isthmus.models.vision.manifest import FEATURES, CorrectnessHead, Exit

EXIT = Exit(name="exit0", accuracy=0.5, agreement=0.5)
EARLY, LATE = np.array([0.2, 0.7, 0.1], np.float32), np.array([0.1, 0.6, 0.3], np.float32)


def test_without_a_head_the_highest_probability_counts() -> None:
    assert exit_score([EARLY, LATE], EXIT) == pytest.approx(0.6)


def test_features_are_those_that_the_docstring_names() -> None:
    entropy = -sum(p * math.log(p) for p in (0.1, 0.6, 0.3))
    wanted = [math.log(0.6 / 0.4), math.log(0.6 / 0.3), entropy, 1.0, math.log(0.7)]
    assert features([EARLY, LATE]) == pytest.approx(wanted, abs=1e-5)
    assert features([LATE])[3:].tolist() == [0.0, 0.0]
    assert len(wanted) == FEATURES


def test_a_head_weighs_features() -> None:
    head = CorrectnessHead(bias=-0.25, weights=(0.0, 1.0, 0.0, 2.0, 0.0))
    judged = EXIT.model_copy(update={"score": head})
    assert exit_score([EARLY, LATE], judged) == pytest.approx(sigmoid(-0.25 + math.log(2) + 2))


def test_certainty_stays_finite() -> None:
    certain = np.array([1.0, 0.0, 0.0], np.float32)
    assert np.isfinite(features([certain, certain])).all()
    head = CorrectnessHead(bias=1e6, weights=(1e6,) * FEATURES)
    assert exit_score([certain], EXIT.model_copy(update={"score": head})) == pytest.approx(1)
