"""An answer by several arms in turn, over a brain that device and cloud share; the cloud is scripted at the link."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from isthmus.edge_agent.language.arms.auto import SPAN_TOKENS, AutoArm, LocalPredictor, RunningArm
from isthmus.edge_agent.language.arms.remote import RemoteArm
from isthmus.edge_agent.language.arms.rounds import Rounds
from isthmus.edge_agent.language.remote_query import RemoteQuery
from isthmus.edge_agent.language.remote_session import RemoteSession, token_opening
from isthmus.edge_agent.language.replicas import Replicas
from isthmus.edge_agent.language.request import GenerationRequest, Span, Token
from isthmus.edge_agent.language.sequence import AnswerSequence
from isthmus.edge_agent.language.stats import GenerationStats
from isthmus.edge_agent.policy.arms import Arm, ArmPlan, ConfidenceStats
from isthmus.edge_agent.policy.speculation import SpeculationStats
from isthmus.models.errors import LinkDown
from isthmus.models.language.sampling import Floats
from isthmus.models.messages import GREEDY, Sampling
from tests.tiny_router import level
from tests.unit.edge_agent.language.scripted_cloud import ENDS, Brain, Cloud, bound

TOKENS = 60
PROMPT = (3, 4)
BRAIN = Brain(1, ends=False)
Route = Callable[[bool, Arm | None], ArmPlan]


@dataclass(frozen=True)
class EveryNth:
    """A confidence head that is confident of all tokens after a prompt but every N-th."""

    every: int
    prompt: int

    def __call__(self, logits_V: Floats, text: Sequence[int]) -> float:
        return 0.2 if (len(text) - self.prompt + 1) % self.every == 0 else 0.9


@dataclass(frozen=True)
class Model:
    """A local model."""

    logits: Callable[[Sequence[int]], Floats]
    context: int


def wrong(text: Sequence[int]) -> Floats:
    """Never what the brain says."""
    logits_V = BRAIN.logits(text).copy()
    logits_V[logits_V.argmax()] = -100
    return logits_V


def always(arm: Arm, likely: float = 0.5, offload_rate: float = 0.0, **fields: Any) -> Route:
    return lambda usable, now: ArmPlan(
        arm if usable or arm != "edge" else "cloud", likely, f"by {arm}", offload_rate, **fields
    )


@dataclass
class Answer:
    """One answer of AutoArm over a scripted cloud."""

    cloud: Cloud
    route: Route
    every: int = 4
    logits: Callable[[Sequence[int]], Floats] = BRAIN.logits
    sampling: Sampling = GREEDY
    context: int = 1000
    prompt: tuple[int, ...] = PROMPT
    stats: GenerationStats = field(default_factory=GenerationStats)
    confidence: ConfidenceStats = field(default_factory=ConfidenceStats)
    speculation: SpeculationStats = field(default_factory=SpeculationStats)

    def __post_init__(self) -> None:
        replicas = Replicas([self.cloud], bound(), 1.0)  # type: ignore[list-item]
        request = GenerationRequest(self.prompt, TOKENS, "auto", self.sampling)
        self.sequence = AnswerSequence(request, ENDS)
        opening = token_opening(self.sequence, 0)
        self.session = RemoteSession(replicas, self.sequence, self.stats, opening)
        model: Any = Model(self.logits, self.context)
        local = LocalPredictor(model, EveryNth(self.every, len(self.prompt)), self.confidence)
        query = RemoteQuery(self.session, self.sequence, self.stats, self.speculation)
        self.arm = AutoArm(self.sequence, self.stats, local, query, self.route, self._begin, self._fall_back)

    def tokens(self) -> list[Token]:
        """All of them, with the session closed after the last."""
        found = list(self.arm.tokens())
        self.session.close()
        return found

    def _begin(self, arm: Arm) -> RunningArm:
        rounds = Rounds(self.session, self.sequence, self.stats, self.speculation)
        return RemoteArm(self.sequence, self.session, rounds, self._fall_back)

    def _fall_back(self, text: Sequence[int]) -> Token:
        return self.sequence.choose(self.logits(text), text)


def auto(cloud: Cloud, route: Route, every: int = 4, **settings: Any) -> Answer:
    return Answer(cloud, route, every, **settings)


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(0.9, 0.9, 3)])
@pytest.mark.parametrize("every", [1, 3, 1000])
def test_with_a_device_that_is_right_the_text_is_the_models(every: int, sampling: Sampling) -> None:
    answer = auto(Cloud(BRAIN), always("edge"), every, sampling=sampling)
    tokens = answer.tokens()
    assert [token.id for token in tokens] == BRAIN.answer(PROMPT, TOKENS, sampling)
    asked = TOKENS // every
    assert [token.source for token in tokens].count("cloud") == answer.stats.rounds == asked
    assert answer.sequence.finish == "length" and not answer.stats.degraded


def test_spans_say_who_made_which_tokens_and_why() -> None:
    answer = auto(Cloud(BRAIN), always("edge"), every=5)
    answer.tokens()
    why = "the device is 20% sure of it, 50% needed"
    assert answer.stats.spans[:3] == [Span("edge", 4, "by edge"), Span("cloud", 1, why), Span("edge", 4, "by edge")]
    assert sum(span.tokens for span in answer.stats.spans) == TOKENS
    assert answer.stats.why == "by edge"


def test_what_the_device_decides_is_not_taken_back() -> None:
    tokens = auto(Cloud(BRAIN), always("edge"), every=3, logits=wrong).tokens()
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
    assert len(answer.tokens()) == TOKENS
    asked, again = TOKENS // 10, len(looked) - TOKENS
    assert answer.stats.rounds == asked
    assert 0 < again <= asked if right else again > asked, "only behind a wrong guess is anything looked at for nothing"


def test_queries_reuse_one_stream_and_send_nothing_again() -> None:
    cloud = Cloud(BRAIN)
    auto(cloud, always("edge"), every=2, prompt=PROMPT * 10).tokens()
    (talk,) = cloud.talks
    assert len(cloud.texts) == 1 and talk.closed, "all queries of an answer cross one stream"
    openings = talk.openings
    assert len(openings) == TOKENS // 2
    assert [len(opening.tokens) for opening in openings] == [21, *[1] * (len(openings) - 1)]


@pytest.mark.parametrize("every", [1, 4, 1000])
def test_the_cloud_reads_the_prompt_while_the_device_does(every: int) -> None:
    cloud = Cloud(BRAIN)
    answer = auto(cloud, always("edge", offload_rate=1 / every, early=True), every, prompt=PROMPT * 10)
    assert [token.id for token in answer.tokens()] == BRAIN.answer(PROMPT * 10, TOKENS)
    asked, openings = TOKENS // every, [opening for talk in cloud.talks for opening in talk.openings]
    assert len(openings) == {1: asked, 4: asked + 1, 1000: 0}[every], "it is prepared where it is likely needed"
    assert len(cloud.talks) <= 2 and all(talk.closed for talk in cloud.talks) and len(cloud.texts) <= 1
    if openings:
        assert len(openings[0].tokens) == 20 and all(len(opening.tokens) < 20 for opening in openings[1:])
    assert answer.stats.bytes_up == sum(talk.bytes_up for talk in cloud.talks)


@pytest.mark.parametrize("every", [4, 1000])
def test_where_money_counts_the_cloud_is_opened_at_the_first_doubt(every: int) -> None:
    cloud, prompt = Cloud(BRAIN), PROMPT * 10
    tokens = auto(cloud, always("edge", offload_rate=0.9), every, prompt=prompt).tokens()
    assert [token.id for token in tokens] == BRAIN.answer(prompt, TOKENS)
    openings = [opening for talk in cloud.talks for opening in talk.openings]
    assert len(openings) == TOKENS // every, "one for each doubt, and none before the first"
    assert [len(opening.tokens) for opening in openings] == [len(prompt) + 3, *[3] * 14][: len(openings)]


@pytest.mark.parametrize("every", [1, 3, 1000])
@pytest.mark.parametrize("arm", ["cloud", "verify"])
def test_first_tokens_are_the_devices_while_the_cloud_reads_the_prompt(arm: Arm, every: int) -> None:
    cloud, prompt = Cloud(BRAIN), PROMPT * 10
    answer = auto(cloud, always(arm, early=True, begins=0.5), every, prompt=prompt)
    tokens = answer.arm.tokens()
    first = next(tokens)
    asked = [opening for talk in cloud.talks for opening in talk.openings]
    assert [len(opening.tokens) for opening in asked] == [len(prompt)], (
        "the cloud has the prompt before the first token"
    )
    assert first.source == ("edge" if every > 1 else "cloud")
    if every > 1:
        assert not cloud.answers, "nobody has waited for it"
    rest = list(tokens)
    assert [first.id, *(token.id for token in rest)] == BRAIN.answer(prompt, TOKENS)
    own = [token.source for token in (first, *rest)].count("edge")
    assert own == {1: 0, 3: 2, 1000: SPAN_TOKENS}[every], "until it is in doubt"
    openings = [opening for talk in cloud.talks for opening in talk.openings]
    assert sum(len(opening.tokens) for opening in openings) <= len(prompt) + own + 1, "nothing goes up twice"
    assert all(talk.closed for talk in cloud.talks) and answer.stats.spans[0].arm == first.source


def test_without_a_level_first_tokens_are_left_to_the_arm() -> None:
    tokens = auto(Cloud(BRAIN), always("cloud", early=True), 1000).tokens()
    assert {token.source for token in tokens} == {"cloud"}


def test_what_was_prepared_in_vain_harms_nothing() -> None:
    for lost in (0, 1):
        cloud = Cloud(BRAIN, away=3, fault=lambda answer, lost=lost: LinkDown("gone") if answer == lost else None)
        answer = auto(cloud, always("edge", offload_rate=0.5, early=True), 4, prompt=PROMPT * 10)
        assert [token.id for token in answer.tokens()] == BRAIN.answer(PROMPT * 10, TOKENS)


def test_the_arm_changes_in_mid_answer() -> None:
    calls: list[tuple[bool, Arm | None]] = []

    def route(usable: bool, now: Arm | None) -> ArmPlan:
        calls.append((usable, now))
        return ArmPlan("edge" if len(calls) < 3 else "cloud", 0.5, f"the {len(calls)}.")

    answer = auto(Cloud(BRAIN), route, every=1000)
    ids = [token.id for token in answer.tokens()]
    assert ids == BRAIN.answer(PROMPT, TOKENS)
    assert answer.stats.spans == [
        Span("edge", 2 * SPAN_TOKENS, "the 1."),
        Span("cloud", TOKENS - 2 * SPAN_TOKENS, "the 3."),
    ]
    assert calls[:3] == [(True, None), (True, "edge"), (True, "edge")] and calls[3][1] == "cloud"


def test_it_comes_back_to_the_device() -> None:
    plans = iter(["cloud", "edge"])
    answer = auto(Cloud(BRAIN), lambda usable, now: ArmPlan(next(plans, "edge"), 0.5, "x"), every=1000)  # type: ignore[arg-type]
    assert [token.id for token in answer.tokens()] == BRAIN.answer(PROMPT, TOKENS)
    assert [(span.arm, span.tokens) for span in answer.stats.spans] == [
        ("cloud", SPAN_TOKENS),
        ("edge", TOKENS - SPAN_TOKENS),
    ]


def test_a_text_that_the_device_cannot_hold_goes_on_in_the_cloud() -> None:
    answer = auto(Cloud(BRAIN), always("edge"), every=1000, context=len(PROMPT) + 20)
    assert [token.id for token in answer.tokens()] == BRAIN.answer(PROMPT, TOKENS)
    assert [(span.arm, span.tokens) for span in answer.stats.spans] == [("edge", 20), ("cloud", TOKENS - 20)]


def test_an_answer_ends_at_an_end_of_text() -> None:
    brain = Brain(4)
    for arm in ("edge", "cloud"):
        answer = auto(Cloud(brain), always(arm), every=3, logits=brain.logits)  # type: ignore[arg-type]
        assert [token.id for token in answer.tokens()] == brain.answer(PROMPT, TOKENS)
        assert answer.sequence.finish == "stop"


@pytest.mark.parametrize("lost", [0, 3, 7])
def test_a_lost_cloud_leaves_the_device_alone_and_it_says_so(lost: int) -> None:
    cloud = Cloud(BRAIN, away=10**6, fault=lambda answer: LinkDown("gone") if answer >= lost else None)
    answer = auto(cloud, always("edge"), every=3)
    tokens = answer.tokens()
    assert [token.id for token in tokens] == BRAIN.answer(PROMPT, TOKENS)
    assert [token.source for token in tokens].count("cloud") == lost
    assert answer.stats.degraded and answer.stats.why.startswith(("gone", "no cloud"))
    assert {span.arm for span in answer.stats.spans} == ({"edge", "cloud"} if lost else {"edge"})


def test_an_answer_given_up_closes_what_is_open() -> None:
    cloud = Cloud(BRAIN)
    answer = auto(cloud, always("cloud"))
    tokens = answer.arm.tokens()
    next(tokens)
    tokens.close()
    assert cloud.talks[-1].closed


def test_nothing_is_sent_for_what_the_device_is_sure_of() -> None:
    cloud = Cloud(BRAIN)
    answer = auto(cloud, always("edge", 0.0), every=2)
    answer.tokens()
    assert not cloud.talks and answer.stats.bytes_up == 0


def test_what_a_query_takes_is_remembered() -> None:
    answer = auto(Cloud(BRAIN), always("edge"))
    assert len(answer.tokens()) == TOKENS
    local = answer.confidence.local_estimate(level(0.5, 0.25, 0.0))
    assert 0 <= local.overhead_s < 1 and local.guess_rate > 0.8, "its guesses are the model's choices"


def test_time_spent_decoding_ahead_is_no_overhead_of_a_query(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that goes on for longer than the cloud needs waits for itself."""
    clock = Clock()
    monkeypatch.setattr("isthmus.edge_agent.language.arms.auto.time", clock)

    def logits(text: Sequence[int]) -> Floats:
        clock.now_s += 1.0
        return BRAIN.logits(text)

    answer = auto(Cloud(BRAIN, rtt_s=0.0, step_s=0.0, seed=3), always("edge"), every=10, logits=logits)
    assert len(answer.tokens()) == TOKENS
    assert clock.now_s > TOKENS, "it decoded ahead"
    assert answer.confidence.local_estimate(level(0.5, 0.25, 0.0)).overhead_s < 0.5


class Clock:
    """Time as a test has it."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def monotonic(self) -> float:
        return self.now_s


def test_pauses_of_the_reader_are_no_latency_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s, measured = [100.0], list[tuple[float, float]]()
    monkeypatch.setattr("time.monotonic", lambda: now_s[0])

    def logits(text: Sequence[int]) -> Floats:
        now_s[0] += 0.01
        return BRAIN.logits(text)

    answer = auto(Cloud(BRAIN), always("edge"), every=1000, logits=logits)
    monkeypatch.setattr(answer.confidence, "record_latency", lambda seconds, predicted_s: measured.append((seconds, 0)))
    for _ in answer.stats.clock.pausing(answer.arm.tokens()):
        now_s[0] += 0.02
    answer.session.close()
    assert [seconds for seconds, _ in measured] == pytest.approx([0.01 * SPAN_TOKENS] * 2 + [0.01 * 12])
