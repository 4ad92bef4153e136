"""The router of tokens: which arms it offers, which it takes, and what it says of that."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.edge_agent.policy.arms import (
    MARGIN,
    RECENT_TOKENS,
    ArmEstimate,
    ConfidenceStats,
    HandoffEstimate,
    LocalEstimate,
    Reading,
    RoutingGoal,
    choose,
    estimate_arms,
)
from isthmus.edge_agent.policy.prices import Objective, Prices
from isthmus.edge_agent.policy.speculation import Acceptance, LatencyModel
from isthmus.models.language.router.manifest import level_for
from tests.tiny_router import level as level_of

LEVELS = (
    level_of(0.0, 0.0, 0.04),
    level_of(0.6, 0.05, 0.01),
    level_of(0.9, 0.2, 0.001),
)
EDGE_S = 0.016
LOCAL = LocalEstimate(likely=0.6, offload_rate=0.05)
SLOW = LatencyModel(rtt_s=0.05, step_s=0.2, draft_s=EDGE_S, acceptance=0.95)
FAST = LatencyModel(rtt_s=0.05, step_s=0.002, draft_s=EDGE_S, acceptance=0.95)
HANDOFF = HandoffEstimate(quality=0.96, offload_rate=0.9, work=1 / 3, state_bytes=378)


@pytest.mark.parametrize(
    ("quality", "likely"), [(0.0, 0.0), (0.96, 0.0), (0.961, 0.6), (0.99, 0.6), (0.995, 0.9), (0.9995, None)]
)
def test_the_level_that_queries_least_and_keeps_the_quality(quality: float, likely: float | None) -> None:
    found = level_for(LEVELS, quality)
    assert (found.likely if found else None) == likely
    assert level_for((), quality) is None


def test_the_offload_rate_is_learned_from_texts() -> None:
    confidence, level = ConfidenceStats(), LEVELS[1]
    assert confidence.local_estimate(level) == LOCAL
    for likely in (0.5, 0.95) * 16:
        confidence.observe(likely)
    confidence.record_query(False, 0.01)
    assert confidence.local_estimate(level) == LocalEstimate(
        likely=0.6, offload_rate=(32 * 0.05 + 16) / 64, overhead_s=0.01, guess_rate=16 * 0.7 / 17
    )
    assert (
        confidence.local_estimate(LEVELS[0]).offload_rate == 0
        and confidence.local_estimate(LEVELS[2]).offload_rate > confidence.local_estimate(level).offload_rate
    )


def test_confidences_count_for_drafts_too() -> None:
    acceptance = Acceptance(0.95)
    confidence = ConfidenceStats(acceptance)
    for _ in range(300):
        confidence.observe(0.7)
    assert acceptance.overall == pytest.approx(0.7, abs=0.02)


def test_what_was_learned_fades_with_answers_that_teach_nothing() -> None:
    confidence, level, offload_rate = ConfidenceStats(), LEVELS[1], []
    confidence.fade()
    for _ in range(RECENT_TOKENS + 50):
        confidence.observe(0.1)
    for _ in range(60):
        offload_rate.append(confidence.local_estimate(level).offload_rate)
        confidence.fade()
    assert (
        offload_rate == sorted(offload_rate, reverse=True)
        and offload_rate[0] > 0.75
        and offload_rate[-1] == level.asked
    )


def arms(
    quality: float,
    latency: LatencyModel = SLOW,
    drafts: bool = True,
    edge: LocalEstimate | None = LOCAL,
    handoff: HandoffEstimate | None = HANDOFF,
) -> list[str]:
    return [estimate.arm for estimate in estimate_arms(RoutingGoal(quality), latency, drafts, EDGE_S, edge, handoff)]


def test_only_arms_that_keep_the_quality_are_offered() -> None:
    assert arms(0.95) == ["verify", "edge", "handoff"]
    assert arms(0.97) == ["verify", "edge"]
    assert arms(1.0, edge=None) == ["verify"]
    assert arms(1.0, drafts=False, edge=None, handoff=None) == ["cloud"]
    assert arms(1.0, latency=FAST, edge=None) == ["cloud"], "where drafting does not pay the cloud streams"


def test_what_a_token_takes() -> None:
    verify, edge, handoff = estimate_arms(RoutingGoal(0.95), SLOW, True, EDGE_S, LOCAL, HANDOFF)
    assert edge.seconds == pytest.approx(EDGE_S + 0.05 * LOCAL.query_s(SLOW, EDGE_S)) and edge.likely == 0.6
    assert handoff.seconds == pytest.approx(EDGE_S + 0.9 * (0.05 + 0.2))
    assert verify.seconds == SLOW.verify_s
    assert edge.usd < verify.usd and edge.usd < handoff.usd
    measured = LatencyModel(0.05, 0.2, EDGE_S, 0.95, measured_s=0.15, measured_tokens=50)
    assert (
        SLOW.verify_s
        < estimate_arms(RoutingGoal(1), measured, True, EDGE_S, None, None)[0].seconds
        == measured.drafting_s
        < 0.15
    )


def test_a_query_takes_what_the_device_cannot_use() -> None:
    whole_s = SLOW.rtt_s + SLOW.step_s

    def takes(offload_rate: float, guess_rate: float, device_s: float = EDGE_S, overhead_s: float = 0.0) -> float:
        return LocalEstimate(0.6, offload_rate, overhead_s, guess_rate).query_s(SLOW, device_s)

    assert takes(0.2, 0.0) == pytest.approx(whole_s) and takes(0.2, 0.0, overhead_s=0.1) == pytest.approx(whole_s + 0.1)
    assert takes(1.0, 1.0) == pytest.approx(whole_s), "it is never sure enough to go on"
    assert takes(0.0, 0.7) == takes(0.2, 0.7, device_s=0.0) == pytest.approx(0.3 * whole_s)
    assert takes(1e-6, 0.7) == pytest.approx(0.3 * whole_s, rel=1e-3)
    chance, found = random.Random(0), []
    for _ in range(20_000):  # a token after the other, until one is doubted or the answer is there
        run = next(tokens for tokens in itertools.count() if chance.random() < 0.1 or tokens * EDGE_S >= whole_s)
        found.append(whole_s - min(run * EDGE_S, whole_s) * (chance.random() < 0.7))
    assert takes(0.1, 0.7) == pytest.approx(sum(found) / len(found), rel=0.03)


def test_predictions_are_corrected_by_measured_latency() -> None:
    confidence, level = ConfidenceStats(), LEVELS[1]
    for _ in range(100):
        confidence.record_latency(0.3, 0.2)
    slow = confidence.local_estimate(level)
    assert slow.slowness == pytest.approx(1.5, abs=0.05)
    edge, predicted = (
        estimate_arms(RoutingGoal(0.97), SLOW, True, EDGE_S, local, None)[1]
        for local in (slow, replace(slow, slowness=1.0))
    )
    assert edge.seconds == pytest.approx(slow.slowness * predicted.seconds)
    plan = choose([edge], RoutingGoal(0.97), None)
    assert plan.predicted_s == pytest.approx(predicted.seconds), "or it would learn of itself"


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))
def test_a_query_never_takes_less_than_nothing(
    offload_rate: float, guess_rate: float, device_s: float, over_s: float
) -> None:
    whole_s = SLOW.rtt_s + SLOW.step_s + over_s
    assert -1e-9 <= LocalEstimate(0.6, offload_rate, over_s, guess_rate).query_s(SLOW, device_s) <= whole_s + 1e-9


def test_what_is_dear_is_not_taken_when_it_shall_be_cheap() -> None:
    fast, cheap = ArmEstimate("cloud", 0.01, 2e-6), ArmEstimate("edge", 0.05, 1e-6, 0.6)
    plan = choose([fast, cheap], RoutingGoal(0.99), None)
    assert (plan.arm, plan.why) == ("cloud", "fastest at 0.99: cloud 10 ms against edge 50 ms")
    plan = choose([fast, cheap], RoutingGoal(0.99, "cheapest"), None)
    assert (plan.arm, plan.likely) == ("edge", 0.6)
    assert plan.why == "cheapest at 0.99: edge 50 ms 1.00 µ$ against cloud 10 ms 2.00 µ$"


def test_where_speed_counts_the_device_begins_while_the_cloud_reads() -> None:
    verify, edge = ArmEstimate("verify", 0.01, 2e-7), ArmEstimate("edge", 0.02, 4e-7, likely=0.9, offload_rate=0.1)
    plan = choose([verify, edge], RoutingGoal(0.99), None)
    assert (plan.arm, plan.early, plan.begins) == ("verify", True, 0.9)
    assert choose([verify], RoutingGoal(1.0), None).begins is None, "no level keeps the quality"
    plan = choose([verify, edge], RoutingGoal(0.99, "cheapest"), None)
    assert (plan.arm, plan.early, plan.begins) == ("verify", False, None)
    plan = choose([replace(verify, seconds=0.1), edge], RoutingGoal(0.99), None)
    assert (plan.arm, plan.early, plan.begins) == ("edge", True, None)


def test_prices_count() -> None:
    free_link = RoutingGoal(0.95, "cheapest", Prices(0.0, 1.0))
    dear_link = RoutingGoal(0.95, "cheapest", Prices(1.0, 0.0))
    none = LocalEstimate(likely=0.99, offload_rate=0.99)
    assert choose(estimate_arms(free_link, SLOW, True, EDGE_S, none, HANDOFF), free_link, None).arm == "verify"
    assert choose(estimate_arms(dear_link, FAST, True, EDGE_S, none, HANDOFF), dear_link, None).arm == "cloud"


def test_a_long_prompt_is_read_once_and_its_price_is_shared() -> None:
    """Where the cloud has yet to read much, `cheapest` leaves the answer to a device that hardly asks."""
    goal = RoutingGoal(0.9, "cheapest", Prices(0.0, 1e-5, 2e-6))  # the device's time has a price too
    sure = replace(LOCAL, offload_rate=0.001)

    def best(unread: int, remaining: float = 64) -> str:
        reading = Reading(unread, 0.01, remaining)
        return choose(estimate_arms(goal, FAST, False, EDGE_S, sure, None, reading), goal, None).arm

    dollars = [Reading(1000, 0.01, 50).usd(goal.prices, rate) for rate in (1.0, 0.1, 0.001, 0.0)]
    assert dollars[0] == pytest.approx(1000 * 0.01 * 1e-5 / 50)
    assert dollars[1:] == sorted(dollars[1:], reverse=True) and dollars[-1] == 0
    assert (best(0), best(4000), best(4000, 1e6)) == ("cloud", "edge", "cloud")


def test_an_engine_that_charges_by_token_counts_its_own() -> None:
    prices = Prices(0.0, 0.0, usd_per_token=1e-6)
    cloud, edge = estimate_arms(RoutingGoal(0.95, "cheapest", prices), FAST, False, EDGE_S, LOCAL, None)
    assert cloud.usd == pytest.approx(1e-6)
    assert edge.usd == pytest.approx(LOCAL.offload_rate * 1e-6)


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
    best = min(estimate.cost(objective)[0] for estimate in made)
    assert min(estimate.cost(objective)[0] for estimate in made if estimate.arm == plan.arm) <= best / MARGIN + 1e-9
