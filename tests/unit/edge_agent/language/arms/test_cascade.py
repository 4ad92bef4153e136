"""Whole answers by the device or the cloud, over a brain that both may share; the cloud is scripted at the link."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import pytest

from isthmus.edge_agent.language.arms.auto import RunningArm
from isthmus.edge_agent.language.arms.cascade import CascadeArm, DeviceDraft
from isthmus.edge_agent.language.arms.remote import RemoteArm
from isthmus.edge_agent.language.arms.rounds import Rounds
from isthmus.edge_agent.language.remote_session import RemoteSession, token_opening
from isthmus.edge_agent.language.replicas import Replicas
from isthmus.edge_agent.language.request import GenerationRequest, Token
from isthmus.edge_agent.language.sequence import AnswerSequence
from isthmus.edge_agent.language.stats import GenerationStats
from isthmus.edge_agent.policy.speculation import SpeculationStats
from isthmus.edge_agent.policy.whole_answers import AnswerPlan
from isthmus.models.errors import LinkDown
from isthmus.models.language.router.answers import CHECK_TOKENS, ENDED, AnswerFeatures
from isthmus.models.language.sampling import Floats
from tests.unit.edge_agent.language.scripted_cloud import ENDS, EOS, Brain, Cloud, bound

TOKENS = 30
PROMPT = (3, 4)
BIG, SMALL = Brain(1, ends=False), Brain(2, ends=False)
EDGE = AnswerPlan("edge", 0.0, 0.0, "quality 0")
QUERY, CASCADE = AnswerPlan("query", 0.5, 0.0, "by the prompt"), AnswerPlan("cascade", 0.0, 0.5, "by the answer")


@dataclass
class Local:
    """The device's model."""

    brain: Brain
    context: int
    texts: list[int] = field(default_factory=list)

    def logits(self, tokens: Sequence[int]) -> Floats:
        assert len(tokens) <= self.context
        self.texts.append(len(tokens))
        return self.brain.logits(tokens)


@dataclass(frozen=True)
class Verifier:
    """Scores of a prompt, and of an answer by its tokens so far."""

    prompt: float = 1.0
    answer: Callable[[int], float] = lambda tokens: 1.0

    def query_score(self, features: AnswerFeatures) -> float:
        return self.prompt

    def running_score(self, features: AnswerFeatures, state: float) -> float:
        return self.answer(len(features))


@dataclass
class Answer:
    plan: AnswerPlan
    verifier: Verifier = Verifier()
    cloud: Cloud = field(default_factory=lambda: Cloud(BIG))
    small: Brain = SMALL
    context: int = 100
    alone: bool = True
    stats: GenerationStats = field(default_factory=GenerationStats)

    def __post_init__(self) -> None:
        self.sequence = AnswerSequence(GenerationRequest(PROMPT, TOKENS, "cascade"), ENDS)
        self.local = Local(self.small, self.context)
        self.draft = DeviceDraft(self.sequence, self.local)  # type: ignore[arg-type]
        self.arm = CascadeArm(
            self.sequence, self.stats, self.draft, self.verifier, self.plan, self._begin  # type: ignore[arg-type]
        )  # fmt: skip

    def _begin(self) -> RunningArm:
        replicas = Replicas([self.cloud], bound(), 0.05)  # type: ignore[list-item]
        session = RemoteSession(replicas, self.sequence, self.stats, token_opening(self.sequence, 0))
        rounds = Rounds(session, self.sequence, self.stats, SpeculationStats())
        return RemoteArm(self.sequence, session, rounds, self.draft.next if self.alone else None)

    def tokens(self) -> list[Token]:
        return list(self.arm.tokens())


def ids(tokens: Sequence[Token]) -> list[int]:
    return [token.id for token in tokens]


def test_an_answer_that_is_accepted_is_the_devices() -> None:
    answer = Answer(CASCADE)
    tokens = answer.tokens()
    assert ids(tokens) == SMALL.answer(PROMPT, TOKENS) and {token.source for token in tokens} == {"edge"}
    assert not answer.cloud.talks and answer.stats.why == "by the answer" and answer.sequence.finished
    assert [(span.arm, span.tokens) for span in answer.stats.spans] == [("edge", TOKENS)]


def test_nothing_is_there_before_it_is_accepted() -> None:
    answer = Answer(CASCADE)
    first = next(answer.arm.tokens())
    assert first.id == answer.draft.tokens[0].id and len(answer.draft.tokens) == TOKENS


def test_one_that_is_refused_is_the_clouds_as_a_whole() -> None:
    answer = Answer(CASCADE, Verifier(answer=lambda tokens: 0.2 if tokens == TOKENS else 0.9))
    tokens = answer.tokens()
    assert ids(tokens) == BIG.answer(PROMPT, TOKENS) and {token.source for token in tokens} == {"cloud"}
    assert answer.stats.why == "the device's answer scored 20% after 30 tokens, 50% needed (by the answer)"
    assert not answer.stats.degraded


def test_it_ends_as_soon_as_it_cannot_be_accepted() -> None:
    answer = Answer(CASCADE, Verifier(answer=lambda tokens: 0.1 if tokens >= CHECK_TOKENS else 0.9))
    assert ids(answer.tokens()) == BIG.answer(PROMPT, TOKENS)
    assert len(answer.draft.tokens) == CHECK_TOKENS == len(answer.local.texts)


def test_a_prompt_may_go_to_the_cloud_at_once() -> None:
    answer = Answer(QUERY, Verifier(prompt=0.3))
    assert ids(answer.tokens()) == BIG.answer(PROMPT, TOKENS) and len(answer.draft.tokens) == 1
    assert answer.stats.why == "the prompt scored 30%, 50% needed (by the prompt)"


@pytest.mark.parametrize("plan", [QUERY, EDGE])
def test_a_good_prompt_is_answered_as_the_device_decodes(plan: AnswerPlan) -> None:
    answer = Answer(plan)
    tokens = answer.arm.tokens()
    next(tokens)
    assert len(answer.draft.tokens) == 1
    assert len(list(tokens)) == TOKENS - 1 and not answer.cloud.talks


def test_without_a_cloud_the_draft_is_finished_and_degraded() -> None:
    verifier = Verifier(answer=lambda tokens: 0.1)
    answer = Answer(CASCADE, verifier, Cloud(BIG, away=float("inf"), alone=float("inf")))
    assert ids(answer.tokens()) == SMALL.answer(PROMPT, TOKENS)
    assert answer.stats.degraded and answer.stats.why == "no cloud answers"
    assert len(answer.local.texts) == TOKENS, "no token is computed twice"
    assert [(span.arm, span.tokens) for span in answer.stats.spans] == [("edge", TOKENS)]


def test_it_waits_for_a_cloud_where_it_is_to() -> None:
    answer = Answer(CASCADE, Verifier(answer=lambda tokens: 0.1), Cloud(BIG, alone=float("inf")), alone=False)
    with pytest.raises(LinkDown):
        answer.tokens()


def test_a_prompt_that_the_device_cannot_hold_is_the_clouds() -> None:
    answer = Answer(CASCADE, context=2)
    assert ids(answer.tokens()) == BIG.answer(PROMPT, TOKENS)
    assert answer.stats.why.startswith("the prompt is longer than the device's model holds")


def test_an_answer_that_fills_the_devices_context_is_the_clouds() -> None:
    answer = Answer(CASCADE, context=12)
    assert ids(answer.tokens()) == BIG.answer(PROMPT, TOKENS) and len(answer.draft.tokens) == 10
    assert answer.stats.why.startswith("the device's answer fills its context")
    streamed = Answer(EDGE, context=12)
    assert ids(streamed.tokens()) == SMALL.answer(PROMPT, 10) and streamed.sequence.finish == "length"


def test_it_ends_at_an_end_of_text() -> None:
    brain = next(brain for brain in map(Brain, range(100)) if EOS in brain.answer(PROMPT, TOKENS))
    states: list[float] = []

    class Watching(Verifier):
        def running_score(self, features: AnswerFeatures, state: float) -> float:
            states.append(state)
            return 1.0

    answer = Answer(CASCADE, Watching(), small=brain)
    assert ids(answer.tokens()) == brain.answer(PROMPT, TOKENS) and answer.sequence.finish == "stop"
    assert states[-1] == ENDED


def test_a_draft_does_not_go_on_with_another_text() -> None:
    draft = Answer(EDGE).draft
    first = draft.extend()
    known = partial(draft.next)
    assert known(PROMPT) == first and known((*PROMPT, first.id + 1)) is None
