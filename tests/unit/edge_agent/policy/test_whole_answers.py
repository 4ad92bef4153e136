"""Who gives a whole answer: levels and costs in, a plan out."""

from __future__ import annotations

from dataclasses import replace

import pytest

from isthmus.edge_agent.policy.arms import RoutingGoal
from isthmus.edge_agent.policy.prices import Objective, Prices
from isthmus.edge_agent.policy.whole_answers import NEVER, AnswerCosts, plan_answer
from isthmus.models.language.router.manifest import OffloadLevel, level_for

COSTS = AnswerCosts(tokens=50, device_s=0.01, cloud_s=0.1, rtt_s=0.05)


def level(likely: float, asked: float, epsilon: float) -> OffloadLevel:
    wrong = {"value": epsilon / 2, "low": 0, "high": epsilon, "samples": 200}
    certificate = {"epsilon": epsilon, "delta": 0.1, "prompts": 200}
    return OffloadLevel.model_validate({"likely": likely, "asked": asked, "wrong": wrong, "certificate": certificate})


ANSWERS = (level(0.3, 0.2, 0.2), level(0.6, 0.4, 0.1), level(0.9, 0.8, 0.05))
QUERIES = (level(0.5, 0.5, 0.1),)


def plan(quality: float, objective: Objective = "cheapest", costs: AnswerCosts = COSTS, **changed: object) -> object:
    given = {"answer_levels": ANSWERS, "query_levels": QUERIES, "cloud_alone": False} | changed
    return plan_answer(RoutingGoal(quality, objective, Prices()), costs=costs, **given)  # type: ignore[arg-type]


def test_the_level_is_the_one_that_is_certified_and_asks_least() -> None:
    assert level_for(ANSWERS, 0.9) == ANSWERS[1] and level_for(ANSWERS, 0.85) == ANSWERS[1]
    assert level_for(ANSWERS, 0.8) == ANSWERS[0] and level_for(ANSWERS, 0.96) is None


def test_a_cascade_asks_the_cloud_for_fewer() -> None:
    made = plan(0.9)
    assert (made.way, made.query, made.accept) == ("cascade", 0.0, 0.6)
    assert made.why == "cheapest at 0.9: cascade 2.52 s 27.80 µ$ against query 2.77 s 34.75 µ$"


def test_a_slow_device_is_not_asked_in_vain() -> None:
    made = plan(0.9, "fastest", replace(COSTS, device_s=0.1))
    assert (made.way, made.query, made.accept) == ("query", 0.5, 0.0)


def test_auto_leaves_the_answer_to_a_cloud_that_is_faster() -> None:
    slow = replace(COSTS, device_s=0.2)
    assert plan(0.9, "fastest", slow, cloud_alone=True).way == "cloud"
    assert plan(0.9, "fastest", slow).way == "query" and plan(0.9, "cheapest", slow, cloud_alone=True).way == "cascade"


@pytest.mark.parametrize("quality", [0.97, 1.0])
def test_what_no_level_keeps_is_the_clouds(quality: float) -> None:
    made = plan(quality)
    assert (made.way, made.query, made.why) == ("cloud", NEVER, f"no level of whole answers keeps {quality:g}")


def test_quality_0_needs_no_cloud() -> None:
    assert plan(0.0, answer_levels=(), query_levels=()).way == "edge"
