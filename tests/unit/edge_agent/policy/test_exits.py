from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.edge_agent.policy.exits import Goal, OperatingPoint, RouteEstimate, Situation, plan
from isthmus.edge_agent.policy.prices import PRESETS, Objective

ON = RouteEstimate("continue", "continue", 0.020, 1e-6)
DEEP = OperatingPoint(1, 0, 1)
SPLIT = RouteEstimate("split", "deep rate 1 (300 B)", 0.060, 2e-6, DEEP)
WHOLE = RouteEstimate("offload", "whole image (5000 B)", 0.050, 9e-6)
FASTEST, CHEAPEST = Goal("fastest", 0.9), Goal("cheapest", 0.9)
AFTER_LAST = Situation("exit1", 0.6, (WHOLE, SPLIT), left_s=1.0, cloud_refused=None)
BETWEEN = Situation("exit0", 0.6, (WHOLE, ON), left_s=1.0, cloud_refused=None)


def test_why_says_how_confident_the_exit_is_and_how_confident_it_must_be() -> None:
    assert plan(replace(AFTER_LAST, confidence=0.95), FASTEST).why == "exit1 confidence 0.950 >= 0.900"
    assert plan(AFTER_LAST, FASTEST).why.startswith("exit1 confidence 0.600 < 0.900; fastest: whole image")
    never = plan(AFTER_LAST, Goal("fastest", 2.0)).why
    assert never.startswith("no threshold of exit1 is certified for this epsilon; fastest: whole image")


@pytest.mark.parametrize("confidence", [0.9, 0.95, 1.0])
def test_a_confident_exit_answers(confidence: float) -> None:
    step = plan(replace(AFTER_LAST, confidence=confidence), FASTEST)
    assert step.route == "exit"
    assert "exit1" in step.why and f"{confidence:.3f}" in step.why and "0.900" in step.why


def test_fastest_takes_the_least_time_and_cheapest_the_least_money() -> None:
    assert plan(AFTER_LAST, FASTEST).route == "offload"
    step = plan(AFTER_LAST, CHEAPEST)
    assert (step.route, step.point) == ("split", DEEP)


def test_why_names_the_choice_and_its_alternatives() -> None:
    why = plan(AFTER_LAST, FASTEST).why
    assert why.index("whole image") < why.index("against") < why.index("deep rate 1")


def test_of_each_tap_only_the_best_is_named_as_an_alternative() -> None:
    light = [
        RouteEstimate("split", f"light rate {rate}", 0.01 + 0.01 * rate, 1e-6, OperatingPoint(0, 0, rate))
        for rate in range(3)
    ]
    deep = [
        RouteEstimate("split", f"deep rate {rate}", 0.05 + 0.01 * rate, 1e-6, OperatingPoint(1, 0, rate))
        for rate in range(3)
    ]
    why = plan(replace(AFTER_LAST, routes=(WHOLE, *deep, *light)), FASTEST).why
    assert [f"{name} rate {rate}" in why for name in ("light", "deep") for rate in range(3)] == [
        True,
        False,
        False,
    ] * 2


def test_a_task_without_an_exit_is_not_answered_by_one_however_confident() -> None:
    lacking = replace(AFTER_LAST, confidence=1.0, no_exit="exits do not answer colour")
    step = plan(lacking, CHEAPEST)
    assert (step.route, step.point) == ("split", DEEP)
    assert step.why.startswith("exits do not answer colour; cheapest: deep rate 1")
    out = plan(replace(lacking, routes=(), cloud_refused="the cloud is down"), CHEAPEST)
    assert out.route == "fallback"
    assert out.why == "exits do not answer colour; the cloud is down; exit1 is the best answer available"


def test_what_cannot_answer_in_time_is_out() -> None:
    assert plan(replace(AFTER_LAST, left_s=0.055), CHEAPEST).route == "offload"


def test_continuing_is_possible_however_late_it_is() -> None:
    assert plan(replace(BETWEEN, left_s=0.0), FASTEST).route == "continue"


def test_nothing_in_time_after_the_last_exit_falls_back_and_says_so() -> None:
    step = plan(replace(AFTER_LAST, left_s=0.010), FASTEST)
    assert step.route == "fallback"
    assert "10 ms" in step.why and "exit1" in step.why


def test_without_a_cloud_the_head_continues_then_falls_back() -> None:
    refused = "the cloud is down"
    between = replace(BETWEEN, routes=(ON,), cloud_refused=refused)
    assert plan(between, FASTEST).route == "continue"
    step = plan(replace(AFTER_LAST, routes=(), cloud_refused=refused), FASTEST)
    assert step.route == "fallback" and refused in step.why


def test_before_the_first_exit_no_confidence_is_named() -> None:
    step = plan(Situation(None, None, (WHOLE, ON), 1.0, None), FASTEST)
    assert step.route == "continue" and "confidence" not in step.why


estimates = st.lists(
    st.builds(
        RouteEstimate,
        route=st.sampled_from(["split", "offload"]),
        way=st.just("route"),
        seconds=st.floats(0, 10),
        usd=st.floats(0, 1),
        point=st.builds(OperatingPoint, st.integers(0, 1), st.integers(0, 3), st.integers(0, 3)),
        bytes=st.just(0.0),
        joules=st.floats(0, 10),
        calls=st.just(1.0),
        agreement=st.floats(0, 1),
        right=st.none(),
        spread_s=st.just(0.0),
        up_bytes=st.just(0.0),
    ),
    max_size=6,
)


@given(estimates, st.floats(0, 1), st.floats(0, 5), st.sampled_from(["fastest", "cheapest", "greenest"]))
def test_the_plan_is_pure_explained_and_the_best_allowed(
    routes: list[RouteEstimate], confidence: float, left_s: float, objective: Objective
) -> None:
    situation = Situation("exit1", confidence, routes, left_s, None)
    step = plan(situation, Goal(objective, 0.9))
    assert step == plan(situation, Goal(objective, 0.9))
    assert step.why
    allowed = [route for route in routes if route.seconds <= left_s]
    if confidence >= 0.9:
        assert step.route == "exit"
    elif not allowed:
        assert step.route == "fallback"
    else:
        weights = PRESETS[objective]
        cost = [weights.cost(route.seconds, route.usd, route.joules, route.agreement) for route in allowed]
        best = allowed[cost.index(min(cost))]
        assert (step.route, step.point) == (best.route, best.point)
