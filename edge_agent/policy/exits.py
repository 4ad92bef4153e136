"""Which way one input goes next. Called before the head runs and after each exit, cheapest first.

confident enough at an exit           -> answer there, unless it was asked what no exit knows
else, of the ways that meet quality   -> the one predicted fastest or cheapest: run on, split at a point, whole image
no way to the cloud within the deadline -> run on; behind the last exit: answer there, degraded
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
    """One way on, with what it is expected to take from here. `point` for split; `name` is for a person."""

    route: Literal["continue", "split", "offload"]
    name: str
    seconds: float
    usd: float
    point: OperatingPoint | None = None


@dataclass(frozen=True, slots=True)
class Goal:
    """What the owner wants: objective, and the confidence from which an exit's answer is good enough."""

    objective: Objective
    exit_confidence: float


@dataclass(frozen=True, slots=True)
class Situation:
    """Where one input stands: `confidence` of the exit just passed (None before the first), why the cloud is out.

    `no_exit`: why no exit may answer this one, whatever its confidence.
    """

    exit_name: str | None
    confidence: float | None
    options: Sequence[RouteEstimate]
    left_s: float
    cloud_refused: str | None
    no_exit: str | None = None


@dataclass(frozen=True, slots=True)
class RoutePlan:
    """What to do, and why in one line."""

    route: Route
    why: str
    point: OperatingPoint | None = None


def plan(situation: Situation, goal: Goal) -> RoutePlan:
    """The next step of one input; a pure function of its arguments."""
    confidence, no_exit = situation.confidence, situation.no_exit
    if no_exit is None and confidence is not None and confidence >= goal.exit_confidence:
        return RoutePlan(
            "exit", f"{situation.exit_name} is {confidence:.3f} sure, {goal.exit_confidence:.3f} is enough"
        )
    unsure = ""
    if no_exit is not None:
        unsure = f"{no_exit}; "
    elif confidence is not None:
        unsure = f"{situation.exit_name} is {confidence:.3f} sure, {goal.exit_confidence:.3f} needed; "
    options = [o for o in situation.options if o.route == "continue" or o.seconds <= situation.left_s]
    if not options:
        reason = situation.cloud_refused or f"nothing answers within the {1000 * situation.left_s:.0f} ms left"
        return RoutePlan("fallback", f"{unsure}{reason}; {situation.exit_name} is the best there is")
    ranked = sorted(options, key=lambda option: option.seconds if goal.objective == "fastest" else option.usd)
    best = ranked[0]
    if situation.cloud_refused and best.route == "continue":
        return RoutePlan("continue", f"{unsure}{situation.cloud_refused}")
    others = ", ".join(describe(option) for option in rivals(ranked))
    against = f" against {others}" if others else ""
    return RoutePlan(best.route, f"{unsure}{goal.objective}: {describe(best)}{against}", best.point)


def rivals(ranked: Sequence[RouteEstimate]) -> list[RouteEstimate]:
    """The best option of each way but the first one's, of a tap too: to name every rate and width would say less."""
    ways: dict[tuple[str, int | None], RouteEstimate] = {}
    for option in ranked:
        ways.setdefault((option.route, option.point.tap if option.point else None), option)
    return list(ways.values())[1:]


def describe(option: RouteEstimate) -> str:
    return f"{option.name} {1000 * option.seconds:.0f} ms {1e6 * option.usd:.2f} µ$"
