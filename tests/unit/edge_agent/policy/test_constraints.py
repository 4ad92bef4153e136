"""Objectives, latency targets, budgets and privacy of a plan, and the table that explains it."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.edge_agent.policy.budgets import UNLIMITED, Spend, shortage
from isthmus.edge_agent.policy.exits import (
    Goal,
    OperatingPoint,
    RouteEstimate,
    Situation,
    best_way,
    candidates,
    plan,
)
from isthmus.edge_agent.policy.prices import PRESETS, Energy, Objective, Weights

SPLIT = RouteEstimate(
    "split", "deep rate 1", 0.060, 2e-6, OperatingPoint(1, 0, 1), 300, 0.30, 1.0, 0.97, 0.87, spread_s=0.010
)
WHOLE = RouteEstimate("offload", "whole image", 0.050, 9e-6, None, 5000, 0.20, 1.0, 0.99, 0.84, spread_s=0.030)
ON = RouteEstimate("continue", "continue", 0.020, 1e-6, None, 100, 0.25, 0.4, 0.96)
HARD = Situation("exit1", 0.6, (WHOLE, SPLIT), left_s=1.0, cloud_refused=None)


@pytest.mark.parametrize(
    ("objective", "route"),
    [("fastest", "offload"), ("cheapest", "split"), ("greenest", "offload"), ("best", "offload")],
)
def test_each_objective_has_its_own_choice(objective: Objective, route: str) -> None:
    assert plan(HARD, Goal(objective, 0.9)).route == route


def test_own_weights_take_the_place_of_the_objectives() -> None:
    assert plan(HARD, Goal("fastest", 0.9, Weights(1, 1e6, 0, 0))).route == "split"


def test_of_two_as_fast_the_better_one_is_sent() -> None:
    """The whole JPEG that agrees less than the own split point, at the same predicted time."""
    jpeg, split = WHOLE._replace(seconds=0.0600, agreement=0.95), SPLIT._replace(seconds=0.0601, agreement=0.97)
    assert plan(replace(HARD, routes=(jpeg, split)), Goal("fastest", 0.9)).route == "split"


def test_best_asks_the_cloud_in_spite_of_an_exit_that_is_confident_enough() -> None:
    sure = replace(HARD, confidence=0.98)
    step = plan(sure, Goal("best", 0.9))
    assert (step.route, step.why[:48]) == ("offload", "exit1 confidence 0.980 < agreement 0.990; best: ")
    assert plan(replace(sure, confidence=0.995), Goal("best", 0.9)).route == "exit"
    assert plan(replace(sure, routes=()), Goal("best", 0.9)).route == "exit"
    assert plan(sure, Goal("fastest", 0.9)).route == "exit"


def test_a_latency_target_is_met_with_its_share_before_the_objective_counts() -> None:
    goal = Goal("fastest", 0.9, target_s=0.090, target_share=0.95)
    step = plan(HARD, goal)
    assert step.route == "split", "50 ± 30 ms is within 99 ms with 95 %, 60 ± 10 ms within 76 ms"
    assert "not whole image: with probability 0.95 it answers within 99 ms only, the target is 90 ms" in step.why
    assert plan(HARD, replace(goal, target_share=0.5)).route == "offload"
    assert plan(replace(HARD, spent_s=0.020), goal).route == "split", "none is in time: the one that misses it least"
    assert "no way meets the target: " in plan(replace(HARD, spent_s=0.020), goal).why


def test_what_a_budget_lacks_excludes_a_way_and_why_says_so() -> None:
    little = replace(HARD, allowance=UNLIMITED._replace(bytes=400.0))
    step = plan(little, Goal("fastest", 0.9))
    assert (step.route, step.lacking) == ("split", None)
    assert step.why.endswith("not whole image: the budget of bytes has 400 B left, 5000 needed")
    assert "against" not in step.why, "what is excluded is no alternative"


def test_without_any_budget_left_the_device_answers_and_says_why() -> None:
    step = plan(replace(HARD, allowance=UNLIMITED._replace(calls=0.5)), Goal("fastest", 0.9))
    assert (step.route, step.lacking) == ("fallback", "budget")
    assert "the budget of calls has 0.5 calls left, 1 needed; exit1 is the best answer available" in step.why
    late = plan(replace(HARD, left_s=0.01, allowance=UNLIMITED._replace(calls=0.0)), Goal("fastest", 0.9))
    assert late.lacking is None, "nothing would have been in time either"


def test_running_the_head_on_takes_no_budget() -> None:
    between = replace(HARD, routes=(WHOLE, ON), allowance=Spend())
    assert plan(between, Goal("fastest", 0.9)).route == "continue"


def test_the_table_names_every_way_with_what_excludes_it() -> None:
    little, goal = replace(HARD, allowance=UNLIMITED._replace(bytes=400.0)), Goal("fastest", 0.9)
    rows = candidates(little, goal, plan(little, goal))
    assert [(row.name, row.chosen) for row in rows] == [
        ("answer at exit1", False), ("whole image", False), ("deep rate 1", True),
    ]  # fmt: skip
    assert [row.excluded for row in rows] == [
        "exit1 confidence 0.600 < 0.900", "the budget of bytes has 400 B left, 5000 needed", None,
    ]  # fmt: skip
    deep = rows[2]
    assert (deep.seconds, deep.spread_s, deep.bytes, deep.usd) == (0.060, 0.010, 300, 2e-6)
    assert (deep.joules, deep.calls, deep.agreement, deep.right) == (0.30, 1.0, 0.97, 0.87)
    sure = replace(HARD, confidence=0.95)
    assert [row.chosen for row in candidates(sure, goal, plan(sure, goal))] == [True, False, False]


@pytest.mark.parametrize("compute_w", [0.5, 6.4, 30.0])
def test_energy_decides_and_flips_at_the_predicted_break_even(compute_w: float) -> None:
    """A narrow bottleneck computes longer, a whole image sends more: they are equal at one price of a bit.

    e_split - e_whole = compute_w * (40 - 5 ms) - up_j * (9000 - 300 B) = 0
    """
    flips = []
    even = compute_w * 0.035 / 8700
    for factor in (0.5, 0.99, 1.01, 2.0):
        energy = Energy(compute_w, 2.0, factor * even, 0.0, 0.0, 0.0)
        split, whole = (
            each._replace(joules=device_s * energy.compute_w + energy.radio_j(up_bytes, 0, 0), agreement=0.97)
            for each, device_s, up_bytes in ((SPLIT, 0.040, 300), (WHOLE, 0.005, 9000))
        )
        flips.append(plan(replace(HARD, routes=(whole, split)), Goal("greenest", 0.9)).route)
    assert flips == ["offload", "offload", "split", "split"]


amounts = st.floats(0, 10)
ways = st.builds(
    RouteEstimate,
    route=st.sampled_from(["split", "offload", "continue"]),
    way=st.just("way"),
    seconds=amounts, usd=amounts, point=st.none(), bytes=amounts, joules=amounts, calls=st.sampled_from([0.5, 1.0]),
    agreement=st.floats(0, 1), right=st.none(), spread_s=st.floats(0, 1),
)  # fmt: skip


@given(
    st.lists(ways, max_size=8),
    st.floats(0, 10),
    st.builds(Spend, amounts, amounts, amounts, amounts),
    st.sampled_from(list(PRESETS)),
    st.one_of(st.just(math.inf), amounts),
)
def test_no_plan_sends_more_than_is_allowed_or_later_than_the_deadline(
    routes: list[RouteEstimate], left_s: float, allowance: Spend, objective: Objective, target_s: float
) -> None:
    situation = Situation("exit1", 0.1, routes, left_s, None, allowance=allowance)
    goal = Goal(objective, 0.9, target_s=target_s)
    chosen, step = best_way(routes, goal, situation.limits), plan(situation, goal)
    if chosen is None:
        assert step.route == "fallback"
        return
    assert step.route == chosen.route
    if chosen.route != "continue":
        assert chosen.seconds <= left_s and shortage(chosen.spend, allowance) is None
    assert sum(row.chosen for row in candidates(situation, goal, step)) >= 1
