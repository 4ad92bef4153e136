from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from isthmus.edge_agent.language.arms.local import LocalArm
from isthmus.edge_agent.language.request import GenerationRequest
from isthmus.edge_agent.language.sequence import AnswerSequence
from isthmus.models.language.sampling import Floats, log_softmax
from isthmus.models.messages import Sampling
from tests.unit.edge_agent.language.scripted_cloud import ENDS, EOS, Brain

PROMPT = (3, 1, 4)


class Local:
    """The brain as the device's model."""

    def __init__(self, brain: Brain) -> None:
        self._brain = brain

    def logits(self, tokens: Sequence[int]) -> Floats:
        return self._brain.logits(tokens)


def arm(brain: Brain, **request: Any) -> tuple[LocalArm, AnswerSequence]:
    sequence = AnswerSequence(GenerationRequest(PROMPT, 30, "edge", **request), ENDS)
    return LocalArm(sequence, Local(brain)), sequence  # type: ignore[arg-type]


def test_it_says_what_the_model_says() -> None:
    for sampling in (Sampling(), Sampling(0.9, 0.9, 5)):
        brain = Brain(1, ends=False)
        made, sequence = arm(brain, sampling=sampling)
        tokens = list(made.tokens())
        assert [token.id for token in tokens] == brain.answer(PROMPT, 30, sampling)
        assert {token.source for token in tokens} == {"edge"} and sequence.finish == "length"


def test_it_ends_at_an_end_of_text() -> None:
    brain = next(brain for brain in map(Brain, range(100)) if EOS in brain.answer(PROMPT, 30))
    made, sequence = arm(brain)
    assert [token.id for token in made.tokens()] == brain.answer(PROMPT, 30) and sequence.finish == "stop"


def test_log_probabilities_are_its_own() -> None:
    brain = Brain(2, ends=False)
    made, _ = arm(brain, top_logprobs=1)
    token = next(made.tokens())
    logs_V = log_softmax(brain.logits(PROMPT))
    assert token.logprob == float(logs_V[token.id]) and token.top == ((token.id, float(logs_V.max())),)
