"""The route of one input. `plan` is called before the head runs and after each exit, cheapest first.

confident enough at an exit -> answer there, unless a requested task has no exit
else, of the ways that keep every constraint -> the one of least cost: continue, split at a point, whole image
none of them -> continue; after the last exit: answer there, degraded

Cost is what the objective weighs (`prices.Weights`). Constraints come before it: the deadline and the budgets exclude a
way, whatever it costs; where no way meets the latency target, the one that misses it least is taken.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import NormalDist
from typing import Literal, NamedTuple

from isthmus.edge_agent.policy.budgets import UNLIMITED, Spend, describe_shortage, shortage
from isthmus.edge_agent.policy.prices import PRESETS, Objective, Weights

Route = Literal["exit", "continue", "split", "offload", "fallback"]


class OperatingPoint(NamedTuple):
    """An operating point of the bottlenecks: indices of a tap, of one of its widths and of one of its rates."""

    tap: int
    width: int
    rate: int


class RouteEstimate(NamedTuple):
    """One way with what it is predicted to take from here on. `point` is for split; `way` is for people.

    bytes: up and down; up_bytes: of the message that it sends, 0 where it sends none. joules: modelled. calls: of a
    cloud. spread_s: standard deviation of the seconds. agreement: of its answers with the cloud model; right: chance
    that they are right; both from the bundle, None where it has none.
    """

    route: Literal["continue", "split", "offload"]
    way: str
    seconds: float
    usd: float
    point: OperatingPoint | None = None
    bytes: float = 0.0
    joules: float = 0.0
    calls: float = 0.0
    agreement: float = 1.0
    right: float | None = None
    spread_s: float = 0.0
    up_bytes: float = 0.0

    @property
    def name(self) -> str:
        """For people; for example "deep rate 3 (939 B)"."""
        return f"{self.way} ({self.up_bytes:.0f} B)" if self.up_bytes else self.way

    @property
    def spend(self) -> Spend:
        """What it takes of the budgets."""
        return Spend(self.bytes, self.usd, self.joules, self.calls)


@dataclass(frozen=True, slots=True)
class Goal:
    """The owner's objective, and the confidence from which an exit's answer is good enough.

    weights: in place of the objective's own. target_s: within which the share `target_share` of requests is to be
    answered.
    """

    objective: Objective
    exit_confidence: float
    weights: Weights | None = None
    target_s: float = math.inf
    target_share: float = 0.95

    @property
    def scale(self) -> Weights:
        """What ways are weighed by."""
        return self.weights or PRESETS[self.objective]


class Limits(NamedTuple):
    """What a request may still take.

    left_s: until its deadline. spent_s: since it began. allowance: of the budgets, less what is reserved for the reply
    and the cloud's time. since_s: since the device last sent anything, while the radio's tail lasts.
    """

    left_s: float = math.inf
    spent_s: float = 0.0
    allowance: Spend = UNLIMITED
    since_s: float = math.inf


FREE = Limits()


@dataclass(frozen=True, slots=True)
class Situation:
    """The state of one input.

    `exit_name` and `confidence` are of the last exit run, None before the first. `cloud_refused` says why the cloud may
    not be used, `no_exit` why no exit may answer whatever its confidence; None if it may. `left_s`, `spent_s` and
    `allowance` are as in Limits.
    """

    exit_name: str | None
    confidence: float | None
    routes: Sequence[RouteEstimate]
    left_s: float
    cloud_refused: str | None
    no_exit: str | None = None
    spent_s: float = 0.0
    allowance: Spend = UNLIMITED

    @property
    def limits(self) -> Limits:
        """What the request may still take."""
        return Limits(self.left_s, self.spent_s, self.allowance)


@dataclass(frozen=True, slots=True)
class RoutePlan:
    """What to do next, and why in one line. `lacking`: of a fallback for want of a budget, "budget"."""

    route: Route
    why: str
    point: OperatingPoint | None = None
    lacking: Literal["budget"] | None = None


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way that was considered, for people and machines. `excluded` says by which constraint; None: by none.

    seconds, spread_s: predicted, and its standard deviation. joules: modelled. agreement: of its answers with the cloud
    model; right: chance that the answer is right; None where nothing is known.
    """

    name: str
    chosen: bool
    excluded: str | None
    seconds: float
    spread_s: float
    bytes: float
    usd: float
    joules: float
    calls: float
    agreement: float | None
    right: float | None


def plan(situation: Situation, goal: Goal) -> RoutePlan:
    """The next step of one input; a pure function of its arguments."""
    confidence, threshold = situation.confidence, goal.exit_confidence
    chosen = None
    if situation.no_exit is None and confidence is not None and confidence >= threshold:
        chosen = best_way(situation.routes, goal, situation.limits) if goal.objective == "best" else None
        if chosen is None or chosen.agreement <= confidence:
            return RoutePlan("exit", f"{situation.exit_name} confidence {confidence:.3f} >= {threshold:.3f}")
        reason = f"{situation.exit_name} confidence {confidence:.3f} < agreement {chosen.agreement:.3f}; "
    else:
        reason = why_no_exit(situation, threshold)
        chosen = best_way(situation.routes, goal, situation.limits)
    if chosen is None:
        return fall_back(situation, goal, reason)
    if chosen.route == "continue":  # of an answer only the last step's reason is told: no alternatives are named here
        return RoutePlan("continue", f"{reason}{situation.cloud_refused or f'{goal.objective}: {describe(chosen)}'}")
    return RoutePlan(chosen.route, f"{reason}{goal.objective}: {why_chosen(chosen, situation, goal)}", chosen.point)


def best_way(routes: Iterable[RouteEstimate], goal: Goal, limits: Limits) -> RouteEstimate | None:
    """The way of least cost that keeps every constraint; where none meets the latency target, the one nearest to it.

    None where the deadline or the budgets exclude all. Running the head on is never excluded by them.
    """
    per_s, per_usd, per_joule, per_share = goal.scale
    spreads, target_s, left_s = deviations(goal.target_share), goal.target_s - limits.spent_s, limits.left_s
    most_bytes, most_usd, most_joules, most_calls = limits.allowance
    best = soonest = None
    best_cost = soonest_s = math.inf
    for each in routes:
        _, _, seconds, usd, _, size, joules, calls, agreement, _, spread_s, _ = each
        if each.route != "continue" and (
            seconds > left_s or size > most_bytes or calls > most_calls or usd > most_usd or joules > most_joules
        ):
            continue
        likely_s = seconds + spreads * spread_s
        if likely_s > target_s:
            if likely_s < soonest_s:
                soonest, soonest_s = each, likely_s
            continue
        cost = per_s * seconds + per_usd * usd + per_joule * joules + per_share * (1.0 - agreement)
        if best is None or cost < best_cost:
            best, best_cost = each, cost
    return best or soonest


def by_cost(routes: Iterable[RouteEstimate], goal: Goal) -> list[RouteEstimate]:
    """The ways in the order of their cost, whether they keep the constraints or not."""
    scale = goal.scale
    return sorted(routes, key=lambda each: scale.cost(each.seconds, each.usd, each.joules, each.agreement))


@cache
def deviations(share: float) -> float:
    """Standard deviations above the mean below which the share `share` of a normal distribution lies."""
    return NormalDist().inv_cdf(min(max(share, 0.5), 0.9999))


def exclusion(each: RouteEstimate, goal: Goal, limits: Limits) -> str | None:
    """Which constraint excludes a way, in words; None if none does."""
    if each.route != "continue" and each.seconds > limits.left_s:
        return f"it takes longer than the {1000 * limits.left_s:.0f} ms left"
    if each.route != "continue" and shortage(each.spend, limits.allowance) is not None:
        return describe_shortage(each.spend, limits.allowance)
    likely_s = limits.spent_s + each.seconds + deviations(goal.target_share) * each.spread_s
    if likely_s > goal.target_s:
        return (
            f"with probability {goal.target_share:g} it answers within {1000 * likely_s:.0f} ms only, "
            f"the target is {1000 * goal.target_s:.0f} ms"
        )
    return None


def fall_back(situation: Situation, goal: Goal, reason: str) -> RoutePlan:
    """The step where nothing may be sent: the last exit's answer."""
    refused, lacking = situation.cloud_refused, None
    if refused is None:
        in_time = [each for each in situation.routes if each.seconds <= situation.left_s]
        refused = f"nothing answers within the {1000 * situation.left_s:.0f} ms left"
        if in_time:
            least = min(in_time, key=lambda each: each.bytes)
            refused, lacking = f"{least.name}: {describe_shortage(least.spend, situation.allowance)}", "budget"
    why = f"{reason}{refused}; {situation.exit_name} is the best answer available"
    return RoutePlan("fallback", why, lacking="budget" if lacking else None)


def why_no_exit(situation: Situation, threshold: float) -> str:
    """The beginning of a `why`: the reason for which the last exit does not answer; empty before the first exit."""
    if situation.no_exit is not None:
        return f"{situation.no_exit}; "
    if situation.confidence is None:
        return ""
    if threshold > 1:
        return f"no threshold of {situation.exit_name} is certified for this epsilon; "
    return f"{situation.exit_name} confidence {situation.confidence:.3f} < {threshold:.3f}; "


def why_chosen(chosen: RouteEstimate, situation: Situation, goal: Goal) -> str:
    """The chosen way, its alternatives, and the constraint that decided where the objective alone did not."""
    ranked, limits = by_cost(situation.routes, goal), situation.limits
    others = ", ".join(
        describe(each) for each in alternatives([chosen, *ranked]) if exclusion(each, goal, limits) is None
    )
    why = f"{describe(chosen)} against {others}" if others else describe(chosen)
    first = ranked[0]
    if first is not chosen and (decided := exclusion(first, goal, limits)) is not None:
        why = f"{why}; not {first.name}: {decided}"
    if (missed := exclusion(chosen, goal, limits)) is not None and chosen is not first:
        why = f"{why}; no way meets the target: {missed}"
    return why


def alternatives(ranked: Sequence[RouteEstimate]) -> list[RouteEstimate]:
    """The best estimate of each route and tap but the first one's. To name every width and rate would say less."""
    best: dict[tuple[str, int | None], RouteEstimate] = {}
    for estimate in ranked:
        best.setdefault((estimate.route, estimate.point.tap if estimate.point else None), estimate)
    return list(best.values())[1:]


def describe(estimate: RouteEstimate) -> str:
    """For example "deep rate 3 (939 B) 40 ms 1.00 µ$"."""
    return f"{estimate.name} {1000 * estimate.seconds:.0f} ms {1e6 * estimate.usd:.2f} µ$"


def candidates(situation: Situation, goal: Goal, step: RoutePlan) -> tuple[Candidate, ...]:
    """Every way that was considered for a step, the cheapest by the objective first; and the last exit."""
    limits = situation.limits
    found = [] if situation.exit_name is None else [exit_candidate(situation, goal, step)]
    for each in by_cost(situation.routes, goal):
        chosen = each.route == step.route and each.point == step.point
        excluded = None if chosen else exclusion(each, goal, limits)
        found.append(
            Candidate(
                each.name,
                chosen,
                excluded,
                each.seconds,
                each.spread_s,
                each.bytes,
                each.usd,
                each.joules,
                each.calls,
                each.agreement,
                each.right,
            )
        )
    return tuple(found)


def exit_candidate(situation: Situation, goal: Goal, step: RoutePlan) -> Candidate:
    """The exit that ran last, which answers at once."""
    chosen = step.route in ("exit", "fallback")
    excluded = None if chosen else why_no_exit(situation, goal.exit_confidence).rstrip("; ") or None
    return Candidate(
        f"answer at {situation.exit_name}", chosen, excluded, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, None, situation.confidence
    )
