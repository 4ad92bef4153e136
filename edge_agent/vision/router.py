"""The next step of a photo: the shell around `policy.exits`, with what an agent has learned.

Knows nothing about graphs, payloads or gRPC.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

from isthmus.edge_agent.config import EdgeConfig, Mode
from isthmus.edge_agent.ledger import Ledger
from isthmus.edge_agent.policy.budgets import UNLIMITED, Spend
from isthmus.edge_agent.policy.estimates import LinkEstimate
from isthmus.edge_agent.policy.exits import Goal, Limits, RoutePlan, Situation, candidates, describe, plan
from isthmus.edge_agent.policy.exploration import Exploration
from isthmus.edge_agent.radio import Radio
from isthmus.edge_agent.vision.costs import Costs
from isthmus.edge_agent.vision.request import RequestState

PRIVATE = "the photo is private"
FALLBACK_RESERVE_S = 0.02  # of the deadline, reserved for the device's own answer after a late cloud
EXPLORE_LEFT_S = 0.05  # with less time left no excluded route is explored: hardly any link replies so soon
TIME_IS_UP = "the photo waited for others of this device until no reply of the cloud would be in time"
HEAD_IDLE_AT_MOST = 20  # photos; then the head runs once, so that a wrong estimate of its latency is corrected


class Router:
    """Routes of one agent's photos. A race between threads may lose one count."""

    def __init__(self, costs: Costs, exits: Sequence[str], ledger: Ledger, radio: Radio) -> None:
        """`exits` are the names of the head's exits, in order."""
        self._costs, self._exits, self._ledger, self._radio = costs, exits, ledger, radio
        self._head_idle = 0  # photos since the head last ran
        self._exploration = Exploration(time.monotonic())

    def next(
        self, state: RequestState, mode: Mode, goal: Goal, estimate: LinkEstimate | None, refused: str | None
    ) -> RoutePlan:
        """The next step: fixed by the mode, or else planned by the policy.

        `estimate` is of the link; `refused` says why the cloud may not be used, None if it may.
        """
        if state.request.private:
            estimate, refused = None, PRIVATE
        situation = self._situation(state, estimate, refused, goal)
        step = self._next(state, mode, goal, situation)
        if state.explain:
            state.candidates = candidates(situation, goal, step)
        return step

    def _next(self, state: RequestState, mode: Mode, goal: Goal, situation: Situation) -> RoutePlan:
        passed, refused = len(state.exits), situation.cloud_refused
        step = self._fixed_by_mode(state, mode) or plan(situation, goal)
        if mode == "edge" or state.request.private:
            return step
        if (mode == "offload" or state.request.forced_split) and self._time_is_up(state, situation):
            return RoutePlan("fallback", TIME_IS_UP)
        if step.route == "fallback" and not refused and step.lacking is None and situation.left_s >= EXPLORE_LEFT_S:
            step = self._explored(step, situation)
        if state.request.no_exit is not None or mode == "offload":
            return step
        if passed:
            self._costs.exit_share[passed - 1].observe(step.route == "exit")
        elif step.route in ("offload", "split"):
            self._head_idle += 1
            if self._head_idle >= HEAD_IDLE_AT_MOST:
                return RoutePlan("continue", f"{step.why}; but the head did not run for {self._head_idle} photos")
        return step

    def cloud_left_s(self, state: RequestState) -> float:
        """Seconds that the cloud has: up to the deadline, less what the device needs for its own answer afterwards."""
        own_s = FALLBACK_RESERVE_S if state.exits else FALLBACK_RESERVE_S + self._costs.segment_s[0].value
        return state.left_s - own_s

    def head_ran(self) -> None:
        """A segment of the head ran."""
        self._head_idle = 0

    def replied(self) -> None:
        """The cloud replied in time."""
        self._exploration.replied()

    def _time_is_up(self, state: RequestState, situation: Situation) -> bool:
        """Whether a photo has waited for others so long that no reply of the cloud is expected in time.

        The estimates of the link may be wrong, and are explored; a queue of the device's own is not.
        """
        if not state.waited or situation.cloud_refused is not None or not situation.routes:
            return False
        return min(route.seconds for route in situation.routes) > self.cloud_left_s(state)

    def _explored(self, step: RoutePlan, situation: Situation) -> RoutePlan:
        """`step`, which is to fall back, or now and then the quickest route in spite of its estimate."""
        sendable = [route for route in situation.routes if route.route != "continue"]
        if not sendable or not self._exploration.due(time.monotonic()):
            return step
        best = min(sendable, key=lambda route: route.seconds)
        return RoutePlan(best.route, f"{step.why}; sent all the same, to measure: {describe(best)}", best.point)

    def _fixed_by_mode(self, state: RequestState, mode: Mode) -> RoutePlan | None:
        """The next step where the mode leaves no choice, else None."""
        request, passed = state.request, len(state.exits)
        if request.private and mode != "auto":
            mode = "edge"
        if request.forced_split:
            return None
        if mode == "offload" and not passed:
            return RoutePlan("offload", "mode offload")
        if mode != "edge":
            return None
        if passed < len(self._exits):
            return RoutePlan("continue", "mode edge")
        return (
            RoutePlan("fallback", f"mode edge; {request.no_exit}")
            if request.no_exit
            else RoutePlan("exit", "mode edge")
        )

    def _situation(
        self, state: RequestState, estimate: LinkEstimate | None, refused: str | None, goal: Goal
    ) -> Situation:
        passed, request = len(state.exits), state.request
        left_s = math.inf if request.forced_split else self.cloud_left_s(state)
        limits = self._limits(state, left_s)
        if estimate is not None and request.whole:
            state.image = self._costs.best_image(estimate, goal)
        return Situation(
            exit_name=self._exits[passed - 1] if passed else None,
            confidence=state.score,
            routes=self._costs.routes(
                passed, estimate if refused is None else None, request, goal, limits, state.image
            ),
            left_s=left_s,
            cloud_refused=refused,
            no_exit=request.no_exit,
            spent_s=limits.spent_s,
            allowance=limits.allowance,
        )

    def _limits(self, state: RequestState, left_s: float) -> Limits:
        """What is left of the request's time and of the budgets.

        The budgets are looked up once a photo: what holds is the reservation before anything is sent.
        """
        if state.allowance is None:
            state.allowance = self._allowance(state)
        return Limits(left_s, time.monotonic() - state.started_s, state.allowance, self._radio.since_s())

    def _allowance(self, state: RequestState) -> Spend:
        """What is left of the budgets, less what is reserved beyond the expected."""
        allowance = self._ledger.allowance()
        if allowance is UNLIMITED:
            return allowance
        reserve = self._costs.margin(self.cloud_left_s(state))
        return Spend(*(has - margin for has, margin in zip(allowance, reserve, strict=True)))


def goal_of(config: EdgeConfig, exit_confidence: float) -> Goal:
    """What an agent of these settings aims at."""
    return Goal(
        config.objective,
        exit_confidence,
        config.weights.over(config.objective),
        math.inf if config.target_s is None else config.target_s,
        config.target_share,
    )
