from __future__ import annotations

import numpy as np
import pytest

from isthmus.edge_agent.language.request import GenerationRequest, Token, cloud_token, local_token
from isthmus.models.language.sampling import log_softmax
from isthmus.models.messages import Logprobs

LOGITS_V = np.array([0.0, 3.0, 1.0, 2.0], np.float32)


def test_a_local_token_is_what_was_chosen() -> None:
    assert local_token(LOGITS_V, 1, GenerationRequest((1,), 5, "edge")) == Token(1, "edge")


@pytest.mark.parametrize("top", [0, 2])
def test_log_probabilities_come_when_they_are_requested(top: int) -> None:
    token = local_token(LOGITS_V, 1, GenerationRequest((1,), 5, "edge", top_logprobs=top))
    logs_V = log_softmax(LOGITS_V)
    assert token.logprob == pytest.approx(float(logs_V[1]))
    assert [id_ for id_, _ in token.top] == [1, 3][:top]


def test_a_cloud_token_has_what_the_cloud_said_of_it() -> None:
    assert cloud_token(4, "draft", None) == Token(4, "draft")
    assert cloud_token(4, "cloud", Logprobs(-0.5, ((4, -0.5), (2, -1.0)))) == Token(
        4, "cloud", -0.5, ((4, -0.5), (2, -1.0))
    )
