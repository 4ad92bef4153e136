"""What judges look at, and what they say of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from models.errors import BundleError
from models.language.judge import EVIDENCE, Judge, evidence

RNG = np.random.default_rng(0)
TENSORS = {
    "judge.0.weight": RNG.normal(size=(5, EVIDENCE)).astype(np.float32),
    "judge.0.bias": RNG.normal(size=5).astype(np.float32),
    "judge.2.weight": RNG.normal(size=(1, 5)).astype(np.float32),
    "judge.2.bias": np.array([0.3], np.float32),
}


def test_evidence_and_judge_are_what_pytorch_says() -> None:
    logits_V = (9 * RNG.normal(size=259)).astype(np.float32)
    log_V = torch.from_numpy(logits_V).log_softmax(0)
    expected = [*log_V.topk(2).values.tolist(), float(-(log_V.exp() * log_V).sum())]
    np.testing.assert_allclose(evidence(logits_V), expected, rtol=1e-4)
    tensors = {name: torch.from_numpy(array) for name, array in TENSORS.items()}
    hidden_F = torch.relu(tensors["judge.0.weight"] @ torch.from_numpy(evidence(logits_V)) + tensors["judge.0.bias"])
    likely = torch.sigmoid(tensors["judge.2.weight"] @ hidden_F + tensors["judge.2.bias"]).item()
    assert Judge.of(TENSORS)(logits_V) == pytest.approx(likely, rel=1e-4)


def test_many_are_judged_as_each_alone() -> None:
    seen_NE = RNG.normal(size=(7, EVIDENCE)).astype(np.float32)
    judge = Judge.of(TENSORS)
    np.testing.assert_allclose(judge.likely(seen_NE), [judge.likely(seen_E) for seen_E in seen_NE], rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "shape"),
    [("judge.0.weight", (5, 2)), ("judge.0.bias", (4,)), ("judge.2.weight", (2, 5)), ("judge.2.bias", (2,))],
)
def test_broken_tensors_are_refused(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(BundleError, match="judge"):
        Judge.of({**TENSORS, name: np.zeros(shape, np.float32)})
    with pytest.raises(BundleError, match="missing"):
        Judge.of({})
