"""An answer by several arms in turn, over a brain that device and cloud share; the cloud is scripted at the link."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest

from isthmus.edge_agent.language.arms.auto import SPAN_TOKENS, Auto, LocalModel
from isthmus.edge_agent.language.arms.verify import SpeculationStats, VerifyArm
from isthmus.edge_agent.language.cloud_answer import CloudAnswer
from isthmus.edge_agent.language.replicas import Replicas
from isthmus.edge_agent.language.request import Arm, GenerationRequest, Span, edge_token
from isthmus.edge_agent.policy.arms import ArmPlan
from isthmus.models.errors import LinkDown
from isthmus.models.language.handoff.manifest import OffloadLevel
from isthmus.models.language.sampling import Floats
from isthmus.models.messages import GREEDY, Sampling
from tests.unit.edge_agent.language.scripted_cloud import ENDS, Brain, Cloud

TOKENS = 60
PROMPT = (3, 4)
BRAIN = Brain(1, ends=False)


@dataclass(frozen=True)
class ConfidenceStats:
    """A judge that is sure of all but every so manyth token behind a prompt."""

    every: int
    prompt: int

    def __call__(self, logits_V: Floats, text: Sequence[int]) -> float:
        return 0.2 if (len(text) - self.prompt + 1) % self.every == 0 else 0.9


def wrong(text: Sequence[int]) -> Floats:
    """Never what the brain says."""
    logits_V = BRAIN.logits(text).copy()
    logits_V[logits_V.argmax()] = -100
    return logits_V


def always(arm: Arm, likely: float = 0.5, asked: float = 0.0) -> Callable[[bool, Arm | None], ArmPlan]:
    return lambda usable, now: ArmPlan(arm if usable or arm != "edge" else "cloud", likely, f"by {arm}", asked)


def auto(
    cloud: Cloud,
    route: Callable[[bool, Arm | None], ArmPlan],
    every: int = 4,
    logits: Callable[[Sequence[int]], Floats] = BRAIN.logits,
    sampling: Sampling = GREEDY,
    context: int = 1000,
    has_device: bool = True,
    prompt: tuple[int, ...] = PROMPT,
) -> Auto:
    replicas = Replicas([cloud], b"themodel", 1.0)  # type: ignore[list-item]
    tempo = SpeculationStats()

    def begin(ask: GenerationRequest) -> CloudAnswer:
        return VerifyArm(ask, ENDS, replicas, tempo, None, lambda text: edge_token(logits(text), ask, len(text)))

    copy = LocalModel(logits, context, ConfidenceStats(every, len(prompt))) if has_device else None
    return Auto(GenerationRequest(prompt, TOKENS, "auto", sampling), ENDS, copy, route, begin)


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(0.9, 0.9, 3)])
@pytest.mark.parametrize("every", [1, 3, 1000])
def test_with_a_device_that_is_right_the_text_is_the_models(every: int, sampling: Sampling) -> None:
    answer = auto(Cloud(BRAIN), always("edge"), every, sampling=sampling)
    tokens = list(answer.tokens())
    assert [token.id for token in tokens] == BRAIN.answer(PROMPT, TOKENS, sampling)
    asked = TOKENS // every
    assert [token.source for token in tokens].count("cloud") == answer.tally.rounds == asked
    assert answer.finish == "length" and not answer.tally.degraded


def test_spans_say_who_made_which_tokens_and_why() -> None:
    answer = auto(Cloud(BRAIN), always("edge"), every=5)
    list(answer.tokens())
    why = "the device is 20% sure of it, 50% needed"
    assert answer.tally.spans[:3] == [Span("edge", 4, "by edge"), Span("cloud", 1, why), Span("edge", 4, "by edge")]
    assert sum(span.tokens for span in answer.tally.spans) == TOKENS
    assert answer.tally.why == "by edge"


def test_what_the_device_decides_is_not_taken_back() -> None:
    tokens = list(auto(Cloud(BRAIN), always("edge"), every=3, logits=wrong).tokens())
    text = list(PROMPT)
    for token in tokens:
        expected = BRAIN.next(text) if token.source == "cloud" else int(wrong(text).argmax())
        assert token.id == expected, "each decides for the text before it, whoever made that"
        text.append(token.id)


@pytest.mark.parametrize("right", [True, False])
def test_while_the_cloud_decides_the_device_goes_on(right: bool) -> None:
    looked: list[int] = []

    def logits(text: Sequence[int]) -> Floats:
        looked.append(len(text))
        return BRAIN.logits(text) if right else wrong(text)

    answer = auto(Cloud(BRAIN, seed=1), always("edge"), every=10, logits=logits)
    assert len(list(answer.tokens())) == TOKENS
    asked, again = TOKENS // 10, len(looked) - TOKENS
    assert answer.tally.rounds == asked
    assert 0 < again <= asked if right else again > asked, "only behind a wrong guess is anything looked at for nothing"


def test_what_the_cloud_holds_is_not_sent_again() -> None:
    cloud = Cloud(BRAIN)
    list(auto(cloud, always("edge"), every=2, prompt=PROMPT * 10).tokens())
    assert len(cloud.texts) == 1 and len(cloud.talks) == TOKENS // 2
    openings = [talk.openings[0] for talk in cloud.talks]
    assert [len(opening.tokens) for opening in openings] == [21, *[1] * (len(openings) - 1)]


@pytest.mark.parametrize("every", [1, 4, 1000])
def test_the_cloud_reads_the_prompt_while_the_device_does(every: int) -> None:
    cloud = Cloud(BRAIN)
    answer = auto(cloud, always("edge", asked=1 / every), every, prompt=PROMPT * 10)
    assert [token.id for token in answer.tokens()] == BRAIN.answer(PROMPT * 10, TOKENS)
    asked = TOKENS // every
    assert len(cloud.talks) == {1: asked, 4: asked + 1, 1000: 0}[every], "it is asked for where it is likely wanted"
    assert all(talk.closed for talk in cloud.talks) and len(cloud.texts) <= 1
    if cloud.talks:
        assert len(cloud.talks[0].openings[0].tokens) == 20
        assert all(len(talk.openings[0].tokens) < 20 for talk in cloud.talks[1:])
    assert answer.tally.bytes_up == sum(talk.bytes_up for talk in cloud.talks)


def test_what_was_prepared_in_vain_harms_nothing() -> None:
    for lost in (0, 1):
        cloud = Cloud(BRAIN, away=3, fault=lambda answer, lost=lost: LinkDown("gone") if answer == lost else None)
        answer = auto(cloud, always("edge", asked=0.5), 4, prompt=PROMPT * 10)
        assert [token.id for token in answer.tokens()] == BRAIN.answer(PROMPT * 10, TOKENS)


def test_the_arm_changes_in_mid_answer() -> None:
    calls: list[tuple[bool, Arm | None]] = []

    def route(usable: bool, now: Arm | None) -> ArmPlan:
        calls.append((usable, now))
        return ArmPlan("edge" if len(calls) < 3 else "cloud", 0.5, f"the {len(calls)}.")

    answer = auto(Cloud(BRAIN), route, every=1000)
    ids = [token.id for token in answer.tokens()]
    assert ids == BRAIN.answer(PROMPT, TOKENS)
    assert answer.tally.spans == [
        Span("edge", 2 * SPAN_TOKENS, "the 1."),
        Span("cloud", TOKENS - 2 * SPAN_TOKENS, "the 3."),
    ]
    assert calls[:3] == [(True, None), (True, "edge"), (True, "edge")] and calls[3][1] == "cloud"


def test_it_comes_back_to_the_device() -> None:
    plans = iter(["cloud", "edge"])
    answer = auto(Cloud(BRAIN), lambda usable, now: ArmPlan(next(plans, "edge"), 0.5, "x"), every=1000)  # type: ignore[arg-type]
    assert [token.id for token in answer.tokens()] == BRAIN.answer(PROMPT, TOKENS)
    assert [(span.arm, span.tokens) for span in answer.tally.spans] == [
        ("cloud", SPAN_TOKENS),
        ("edge", TOKENS - SPAN_TOKENS),
    ]


def test_a_text_that_the_device_cannot_hold_goes_on_in_the_cloud() -> None:
    answer = auto(Cloud(BRAIN), always("edge"), every=1000, context=len(PROMPT) + 20)
    assert [token.id for token in answer.tokens()] == BRAIN.answer(PROMPT, TOKENS)
    assert [(span.arm, span.tokens) for span in answer.tally.spans] == [("edge", 20), ("cloud", TOKENS - 20)]


def test_without_the_device_the_cloud_has_it_all() -> None:
    answer = auto(Cloud(BRAIN), always("edge"), has_device=False)
    assert {token.source for token in answer.tokens()} == {"cloud"}


def test_an_answer_ends_at_an_end_of_text() -> None:
    brain = Brain(4)
    for arm in ("edge", "cloud"):
        answer = auto(Cloud(brain), always(arm), every=3, logits=brain.logits)  # type: ignore[arg-type]
        assert [token.id for token in answer.tokens()] == brain.answer(PROMPT, TOKENS)
        assert answer.finish == "stop"


@pytest.mark.parametrize("lost", [0, 3, 7])
def test_a_lost_cloud_leaves_the_device_alone_and_it_says_so(lost: int) -> None:
    cloud = Cloud(BRAIN, away=10**6, fault=lambda answer: LinkDown("gone") if answer >= lost else None)
    answer = auto(cloud, always("edge"), every=3)
    tokens = list(answer.tokens())
    assert [token.id for token in tokens] == BRAIN.answer(PROMPT, TOKENS)
    assert [token.source for token in tokens].count("cloud") == lost
    assert answer.tally.degraded and answer.tally.why.startswith(("gone", "no cloud"))
    assert {span.arm for span in answer.tally.spans} == ({"edge", "cloud"} if lost else {"edge"})


def test_an_answer_given_up_closes_what_is_open() -> None:
    cloud = Cloud(BRAIN)
    answer = auto(cloud, always("cloud"))
    tokens = answer.tokens()
    next(tokens)
    tokens.close()
    assert cloud.talks[-1].closed


def test_nothing_is_sent_for_what_the_device_is_sure_of() -> None:
    cloud = Cloud(BRAIN)
    answer = auto(cloud, always("edge", 0.0), every=2)
    list(answer.tokens())
    assert not cloud.talks and answer.tally.bytes_up == 0


def test_what_a_question_really_takes_is_remembered() -> None:
    answer = auto(Cloud(BRAIN), always("edge"))
    assert answer._copy is not None
    assert len(list(answer.tokens())) == TOKENS
    own = answer._copy.doubts.on(OffloadLevel(likely=0.5, asked=0.25, wrong=0))
    assert 0 <= own.overhead_s < 1 and own.guessed > 0.8, "its guesses are the model's choices"
