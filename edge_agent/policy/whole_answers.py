"""Who gives a whole answer. Pure: levels and costs in, a plan out, which says why.

    edge      the device
    query     by the prompt: the device, or the cloud at once
    cascade   the device answers, and the cloud does where that answer does not reach a score
    cloud     the cloud

The quality of a whole answer is a promise with a number: the share of answers that are acceptable, being the cloud's
own or no worse. A query that is routed by its prompt costs one answer, and its tokens are there at once; a cascade
costs the device's answer always and is right more often, so that it asks the cloud for fewer. Measured costs decide.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from isthmus.edge_agent.policy.arms import NOTHING_UNREAD, STREAM_BYTES, Reading, RoutingGoal
from isthmus.models.language.router.manifest import OffloadLevel, level_for

Way = Literal["edge", "query", "cascade", "cloud"]
ALWAYS, NEVER = 0.0, 2.0  # scores that every answer reaches, and none


@dataclass(frozen=True, slots=True)
class AnswerCosts:
    """Of a typical answer of so many tokens: seconds of a token on each side, and of a round trip.

    reading: of the prompt, by the cloud.
    """

    tokens: float
    device_s: float
    cloud_s: float
    rtt_s: float
    reading: Reading = NOTHING_UNREAD


@dataclass(frozen=True, slots=True)
class AnswerPlan:
    """How one whole answer is routed.

    query: score of the prompt below which the cloud answers at once. accept: score of the device's answer below which
    the cloud answers instead; with 0 the device's tokens need not wait for it.
    """

    way: Way
    query: float
    accept: float
    why: str


@dataclass(frozen=True, slots=True)
class Estimate:
    """A way that keeps the quality, with the expected seconds and dollars of an answer."""

    way: Way
    threshold: float
    seconds: float
    usd: float


def plan_answer(
    goal: RoutingGoal,
    answer_levels: Sequence[OffloadLevel],
    query_levels: Sequence[OffloadLevel],
    costs: AnswerCosts,
    *,
    cloud_alone: bool,
) -> AnswerPlan:
    """The fastest or the cheapest way that keeps the quality. `cloud_alone`: whether the cloud may give every answer.

    Where no level keeps the quality, it does.
    """
    if goal.quality <= 0:
        return AnswerPlan("edge", ALWAYS, ALWAYS, "quality 0 needs no cloud")
    found = estimates(goal, answer_levels, query_levels, costs)
    if not found:
        return AnswerPlan("cloud", NEVER, ALWAYS, f"no level of whole answers keeps {goal.quality:g}")
    if cloud_alone:
        found.append(Estimate("cloud", NEVER, *spent(goal, costs, 0.0, 1.0)))
    best = min(found, key=lambda each: each.seconds if goal.objective == "fastest" else each.usd)
    others = [each for each in found if each is not best]
    why = f"{goal.objective} at {goal.quality:g}: {' against '.join(map(describe, (best, *others)))}"
    if best.way == "cascade":
        return AnswerPlan("cascade", ALWAYS, best.threshold, why)
    return AnswerPlan(best.way, best.threshold, ALWAYS, why)


def estimates(
    goal: RoutingGoal, answer_levels: Sequence[OffloadLevel], query_levels: Sequence[OffloadLevel], costs: AnswerCosts
) -> list[Estimate]:
    """Those in which the device takes part."""
    found = []
    if (level := level_for(answer_levels, goal.quality)) is not None:
        found.append(Estimate("cascade", level.likely, *spent(goal, costs, 1.0, level.asked)))
    if (level := level_for(query_levels, goal.quality)) is not None:
        found.append(Estimate("query", level.likely, *spent(goal, costs, 1 - level.asked, level.asked)))
    return found


def spent(goal: RoutingGoal, costs: AnswerCosts, device: float, cloud: float) -> tuple[float, float]:
    """Seconds and dollars of an answer, of which the device and the cloud generate these shares."""
    device_s, cloud_s = device * costs.tokens * costs.device_s, cloud * costs.tokens * costs.cloud_s
    usd = goal.prices.usd(cloud * costs.tokens * STREAM_BYTES, cloud_s, device_s)
    usd += cloud * costs.tokens * (goal.prices.usd_per_token + costs.reading.usd(goal.prices, 1.0))
    return device_s + cloud * costs.rtt_s + cloud_s, usd


def describe(estimate: Estimate) -> str:
    """An estimate for a person."""
    return f"{estimate.way} {estimate.seconds:.2f} s {1e6 * estimate.usd:.2f} µ$"
