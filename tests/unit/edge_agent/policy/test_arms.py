"""The router of tokens: which arms it offers, which it takes, and what it says of that."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.edge_agent.policy.arms import (
    KNOWN_TOKENS,
    MARGIN,
    ArmEstimate,
    ConfidenceStats,
    HandoffEstimate,
    LocalEstimate,
    RoutingGoal,
    choose,
    level_for,
    offers,
)
from isthmus.edge_agent.policy.prices import Objective, Prices
from isthmus.edge_agent.policy.speculation import Acceptance, LatencyModel
from isthmus.models.language.handoff.manifest import OffloadLevel

LEVELS = (
    OffloadLevel(likely=0.0, asked=0.0, wrong=0.04),
    OffloadLevel(likely=0.6, asked=0.05, wrong=0.01),
    OffloadLevel(likely=0.9, asked=0.2, wrong=0.001),
)
EDGE_S = 0.016
OWN = LocalEstimate(likely=0.6, asked=0.05)
SLOW = LatencyModel(rtt_s=0.05, pass_s=0.2, draft_s=EDGE_S, acceptance=0.95)
FAST = LatencyModel(rtt_s=0.05, pass_s=0.002, draft_s=EDGE_S, acceptance=0.95)
SHARED = HandoffEstimate(quality=0.96, asked=0.9, work=1 / 3, state_bytes=378)


@pytest.mark.parametrize(
    ("quality", "likely"), [(0.0, 0.0), (0.96, 0.0), (0.961, 0.6), (0.99, 0.6), (0.995, 0.9), (0.9995, None)]
)
def test_the_level_that_asks_least_and_keeps_the_quality(quality: float, likely: float | None) -> None:
    found = level_for(LEVELS, quality)
    assert (found.likely if found else None) == likely
    assert level_for((), quality) is None


def test_how_much_is_asked_is_learnt_from_texts() -> None:
    doubts, level = ConfidenceStats(), LEVELS[1]
    assert doubts.on(level) == OWN
    for likely in (0.5, 0.95) * 16:
        doubts.observe(likely)
    doubts.answered(False, 0.01)
    assert doubts.on(level) == LocalEstimate(
        likely=0.6, asked=(32 * 0.05 + 16) / 64, overhead_s=0.01, guessed=16 * 0.7 / 17
    )
    assert doubts.on(LEVELS[0]).asked == 0 and doubts.on(LEVELS[2]).asked > doubts.on(level).asked


def test_what_the_judge_says_holds_for_drafts_too() -> None:
    acceptance = Acceptance(0.95)
    doubts = ConfidenceStats(acceptance)
    for _ in range(300):
        doubts.observe(0.7)
    assert acceptance.overall == pytest.approx(0.7, abs=0.02)


def test_what_was_learnt_fades_with_answers_that_teach_nothing() -> None:
    doubts, level, asked = ConfidenceStats(), LEVELS[1], []
    doubts.fade()
    for _ in range(KNOWN_TOKENS + 50):
        doubts.observe(0.1)
    for _ in range(60):
        asked.append(doubts.on(level).asked)
        doubts.fade()
    assert asked == sorted(asked, reverse=True) and asked[0] > 0.75 and asked[-1] == level.asked


def arms(
    quality: float,
    pace: LatencyModel = SLOW,
    drafts: bool = True,
    edge: LocalEstimate | None = OWN,
    shared: HandoffEstimate | None = SHARED,
) -> list[str]:
    return [offer.arm for offer in offers(RoutingGoal(quality), pace, drafts, EDGE_S, edge, shared)]


def test_only_arms_that_keep_the_quality_are_offered() -> None:
    assert arms(0.95) == ["verify", "edge", "handoff"]
    assert arms(0.97) == ["verify", "edge"]
    assert arms(1.0, edge=None) == ["verify"]
    assert arms(1.0, drafts=False, edge=None, shared=None) == ["cloud"]
    assert arms(1.0, pace=FAST, edge=None) == ["cloud"], "where drafting does not pay the cloud streams"


def test_what_a_token_takes() -> None:
    verify, edge, handoff = offers(RoutingGoal(0.95), SLOW, True, EDGE_S, OWN, SHARED)
    assert edge.seconds == pytest.approx(EDGE_S + 0.05 * OWN.question_s(SLOW, EDGE_S)) and edge.likely == 0.6
    assert handoff.seconds == pytest.approx(EDGE_S + 0.9 * (0.05 + 0.2))
    assert verify.seconds == SLOW.verify_s
    assert edge.usd < verify.usd and edge.usd < handoff.usd
    measured = LatencyModel(0.05, 0.2, EDGE_S, 0.95, measured_s=0.15, measured_tokens=50)
    assert (
        SLOW.verify_s
        < offers(RoutingGoal(1), measured, True, EDGE_S, None, None)[0].seconds
        == measured.drafting_s
        < 0.15
    )


def test_a_question_takes_what_the_device_cannot_use() -> None:
    whole_s = SLOW.rtt_s + SLOW.pass_s

    def takes(asked: float, guessed: float, device_s: float = EDGE_S, overhead_s: float = 0.0) -> float:
        return LocalEstimate(0.6, asked, overhead_s, guessed).question_s(SLOW, device_s)

    assert takes(0.2, 0.0) == pytest.approx(whole_s) and takes(0.2, 0.0, overhead_s=0.1) == pytest.approx(whole_s + 0.1)
    assert takes(1.0, 1.0) == pytest.approx(whole_s), "it is never sure enough to go on"
    assert takes(0.0, 0.7) == takes(0.2, 0.7, device_s=0.0) == pytest.approx(0.3 * whole_s)
    assert takes(1e-6, 0.7) == pytest.approx(0.3 * whole_s, rel=1e-3)
    chance, found = random.Random(0), []
    for _ in range(20_000):  # a token after the other, until one is doubted or the answer is there
        run = next(tokens for tokens in itertools.count() if chance.random() < 0.1 or tokens * EDGE_S >= whole_s)
        found.append(whole_s - min(run * EDGE_S, whole_s) * (chance.random() < 0.7))
    assert takes(0.1, 0.7) == pytest.approx(sum(found) / len(found), rel=0.03)


def test_reckoning_learns_from_what_tokens_took() -> None:
    doubts, level = ConfidenceStats(), LEVELS[1]
    for _ in range(100):
        doubts.took(0.3, 0.2)
    slow = doubts.on(level)
    assert slow.slowness == pytest.approx(1.5, abs=0.05)
    edge, reckoned = (
        offers(RoutingGoal(0.97), SLOW, True, EDGE_S, own, None)[1] for own in (slow, replace(slow, slowness=1.0))
    )
    assert edge.seconds == pytest.approx(slow.slowness * reckoned.seconds)
    plan = choose([edge], RoutingGoal(0.97), None)
    assert plan.reckoned_s == pytest.approx(reckoned.seconds), "or it would learn of itself"


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))
def test_a_question_never_takes_less_than_nothing(asked: float, guessed: float, device_s: float, over_s: float) -> None:
    whole_s = SLOW.rtt_s + SLOW.pass_s + over_s
    assert -1e-9 <= LocalEstimate(0.6, asked, over_s, guessed).question_s(SLOW, device_s) <= whole_s + 1e-9


def test_what_is_dear_is_not_taken_when_it_shall_be_cheap() -> None:
    fast, cheap = ArmEstimate("cloud", 0.01, 2e-6), ArmEstimate("edge", 0.05, 1e-6, 0.6)
    plan = choose([fast, cheap], RoutingGoal(0.99), None)
    assert (plan.arm, plan.why) == ("cloud", "fastest at 0.99: cloud 10 ms against edge 50 ms")
    plan = choose([fast, cheap], RoutingGoal(0.99, "cheapest"), None)
    assert (plan.arm, plan.likely) == ("edge", 0.6)
    assert plan.why == "cheapest at 0.99: edge 50 ms 1.00 µ$ against cloud 10 ms 2.00 µ$"


def test_prices_count() -> None:
    free_link = RoutingGoal(0.95, "cheapest", Prices(0.0, 1.0))
    dear_link = RoutingGoal(0.95, "cheapest", Prices(1.0, 0.0))
    none = LocalEstimate(likely=0.99, asked=0.99)
    assert choose(offers(free_link, SLOW, True, EDGE_S, none, SHARED), free_link, None).arm == "verify"
    assert choose(offers(dear_link, FAST, True, EDGE_S, none, SHARED), dear_link, None).arm == "cloud"


def test_a_change_must_be_worth_it() -> None:
    here, little, much = (
        ArmEstimate("edge", 0.020, 0.0),
        ArmEstimate("verify", 0.0185, 0.0),
        ArmEstimate("verify", 0.017, 0.0),
    )
    assert choose([here, little], RoutingGoal(0.9), None).arm == "verify"
    assert choose([here, little], RoutingGoal(0.9), "edge").arm == "edge"
    assert choose([here, much], RoutingGoal(0.9), "edge").arm == "verify"
    assert choose([here, little], RoutingGoal(0.9), "cloud").arm == "verify", "the arm at work is not offered any more"


COSTS = st.floats(0, 10)


@given(
    st.lists(st.tuples(st.sampled_from(["edge", "cloud", "verify", "handoff"]), COSTS, COSTS), min_size=1, max_size=4),
    st.sampled_from(["fastest", "cheapest"]),
    st.sampled_from([None, "edge", "cloud", "verify", "handoff"]),
)
def test_it_is_never_much_worse_than_the_best(
    found: list[tuple[object, float, float]], objective: Objective, now: object
) -> None:
    made = [ArmEstimate(arm, seconds, usd) for arm, seconds, usd in found]  # type: ignore[arg-type]
    plan = choose(made, RoutingGoal(0.9, objective), now)  # type: ignore[arg-type]
    best = min(offer.cost(objective)[0] for offer in made)
    assert min(offer.cost(objective)[0] for offer in made if offer.arm == plan.arm) <= best / MARGIN + 1e-9
