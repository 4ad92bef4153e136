"""Training of confidence heads, and decisions at a threshold."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from isthmus.models.language.handoff.confidence_head import FEATURES, ConfidenceHead
from isthmus.models.recipes.language.confidence_head import confidences, decide, head_tensors, train_confidence_head


def test_a_head_learns_what_can_be_known() -> None:
    torch.manual_seed(0)
    features_NF = 5 + 3 * torch.randn(6000, 6)
    chance_N = torch.sigmoid(2 * (features_NF[:, 2] - 5) / 3)
    right_N = torch.rand(6000) < chance_N
    confidence_N = confidences(
        train_confidence_head(features_NF, right_N, 0), 5 + 3 * torch.randn(4, 6).index_fill(1, torch.tensor([2]), 0.0)
    )
    assert confidence_N.shape == (4,)
    confidence_N = confidences(train_confidence_head(features_NF, right_N, 0), features_NF)
    assert (confidence_N - chance_N).abs().mean() < 0.06


def test_the_first_confident_exit_decodes_a_token() -> None:
    confidence_EN = torch.tensor([[0.9, 0.2, 0.1, 0.9], [0.1, 0.8, 0.3, 0.95]])
    right_EN = torch.tensor([[True, False, False, False], [False, True, True, True]])
    found = decide(confidence_EN, right_EN, 0.7)
    assert found.sure_N.tolist() == [True, True, False, True] and found.right_N[found.sure_N].tolist() == [
        True,
        True,
        False,
    ]
    assert (found.coverage, found.agreement) == (0.75, pytest.approx(2 / 3))
    assert decide(confidence_EN, right_EN, 1.0).agreement == 1.0
    some = found.select(torch.tensor([False, True, True, False]))
    assert (some.sure_N.tolist(), some.exit_N.tolist(), some.coverage, some.agreement) == (
        [True, False],
        [1, 0],
        0.5,
        1.0,
    )


def test_a_stored_head_predicts_the_same_without_pytorch() -> None:
    torch.manual_seed(0)
    features_NF = torch.randn(500, FEATURES)
    head = train_confidence_head(features_NF, features_NF[:, 0] + torch.randn(500) > 0, 3)
    stored = ConfidenceHead.from_tensors(head_tensors(head))
    np.testing.assert_allclose(stored.predict(features_NF.numpy()), confidences(head, features_NF), atol=1e-5)


def test_training_is_repeatable() -> None:
    features_NF = torch.randn(200, 4, generator=torch.Generator().manual_seed(0))
    one, other = (train_confidence_head(features_NF, features_NF[:, 0] > 0, 7) for _ in range(2))
    assert torch.equal(confidences(one, features_NF), confidences(other, features_NF))
