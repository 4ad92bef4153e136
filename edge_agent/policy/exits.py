"""The route of one input. `plan` is called before the head runs and after each exit, cheapest first.

confident enough at an exit -> answer there, unless a requested task has no exit
else, of the routes that meet quality -> the one predicted fastest or cheapest: continue, split at a point, whole image
no route to the cloud within the deadline -> continue; after the last exit: answer there, degraded
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from isthmus.edge_agent.policy.prices import Objective

Route = Literal["exit", "continue", "split", "offload", "fallback"]


@dataclass(frozen=True, slots=True)
class OperatingPoint:
    """An operating point of the bottlenecks: indices of a tap, of one of its widths and of one of its rates."""

    tap: int
    width: int
    rate: int


@dataclass(frozen=True, slots=True)
class RouteEstimate:
    """One route with its predicted latency and cost from here on. `point` is for split; `name` is for people."""

    route: Literal["continue", "split", "offload"]
    name: str
    seconds: float
    usd: float
    point: OperatingPoint | None = None


@dataclass(frozen=True, slots=True)
class Goal:
    """The owner's objective, and the confidence from which an exit's answer is good enough."""

    objective: Objective
    exit_confidence: float


@dataclass(frozen=True, slots=True)
class Situation:
    """The state of one input.

    `exit_name` and `confidence` are of the last exit run, None before the first. `cloud_refused` says why the cloud may
    not be used, `no_exit` why no exit may answer whatever its confidence; None if it may.
    """

    exit_name: str | None
    confidence: float | None
    routes: Sequence[RouteEstimate]
    left_s: float
    cloud_refused: str | None
    no_exit: str | None = None


@dataclass(frozen=True, slots=True)
class RoutePlan:
    """What to do next, and why in one line."""

    route: Route
    why: str
    point: OperatingPoint | None = None


def plan(situation: Situation, goal: Goal) -> RoutePlan:
    """The next step of one input; a pure function of its arguments."""
    confidence, threshold = situation.confidence, goal.exit_confidence
    if situation.no_exit is None and confidence is not None and confidence >= threshold:
        return RoutePlan("exit", f"{situation.exit_name} confidence {confidence:.3f} >= {threshold:.3f}")
    reason = why_no_exit(situation, threshold)
    routes = [route for route in situation.routes if route.route == "continue" or route.seconds <= situation.left_s]
    if not routes:
        refused = situation.cloud_refused or f"nothing answers within the {1000 * situation.left_s:.0f} ms left"
        return RoutePlan("fallback", f"{reason}{refused}; {situation.exit_name} is the best answer available")
    ranked = sorted(routes, key=lambda route: route.seconds if goal.objective == "fastest" else route.usd)
    best = ranked[0]
    if situation.cloud_refused and best.route == "continue":
        return RoutePlan("continue", f"{reason}{situation.cloud_refused}")
    others = ", ".join(describe(route) for route in alternatives(ranked))
    against = f" against {others}" if others else ""
    return RoutePlan(best.route, f"{reason}{goal.objective}: {describe(best)}{against}", best.point)


def why_no_exit(situation: Situation, threshold: float) -> str:
    """The beginning of a `why`: the reason for which the last exit does not answer; empty before the first exit."""
    if situation.no_exit is not None:
        return f"{situation.no_exit}; "
    if situation.confidence is None:
        return ""
    if threshold > 1:
        return f"no threshold of {situation.exit_name} is certified for this epsilon; "
    return f"{situation.exit_name} confidence {situation.confidence:.3f} < {threshold:.3f}; "


def alternatives(ranked: Sequence[RouteEstimate]) -> list[RouteEstimate]:
    """The best estimate of each route and tap but the first one's. To name every width and rate would say less."""
    best: dict[tuple[str, int | None], RouteEstimate] = {}
    for estimate in ranked:
        best.setdefault((estimate.route, estimate.point.tap if estimate.point else None), estimate)
    return list(best.values())[1:]


def describe(estimate: RouteEstimate) -> str:
    """For example "deep rate 3 (939 B) 40 ms 1.00 µ$"."""
    return f"{estimate.name} {1000 * estimate.seconds:.0f} ms {1e6 * estimate.usd:.2f} µ$"
