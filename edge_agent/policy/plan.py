"""Which way one input goes next. Called before the head runs and after each exit, cheapest first.

confident enough at an exit           -> answer there
else, of the ways that meet quality   -> the one predicted fastest or cheapest: run on, split at a rate, whole image
no way to the cloud within the deadline -> run on; behind the last exit: answer there, degraded
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Route = Literal["exit", "continue", "split", "offload", "fallback"]
Objective = Literal["fastest", "cheapest"]


@dataclass(frozen=True, slots=True)
class Prices:
    """US dollars. Defaults: an IoT data plan, a small cloud CPU, and a device that is paid for."""

    up_usd_per_byte: float = 0.50 / 1e9
    cloud_usd_per_s: float = 0.05 / 3600
    device_usd_per_s: float = 0.0

    def usd(self, up_bytes: float, cloud_s: float, device_s: float) -> float:
        return up_bytes * self.up_usd_per_byte + cloud_s * self.cloud_usd_per_s + device_s * self.device_usd_per_s


@dataclass(frozen=True, slots=True)
class Option:
    """One way on, with what it is expected to take from here. `rate` for split; `name` is for a person."""

    route: Literal["continue", "split", "offload"]
    name: str
    seconds: float
    usd: float
    rate: int | None = None


@dataclass(frozen=True, slots=True)
class Goal:
    """What the owner wants: objective, and the confidence from which an exit's answer is good enough."""

    objective: Objective
    exit_confidence: float


@dataclass(frozen=True, slots=True)
class Situation:
    """Where one input stands: `confidence` of the exit just passed (None before the first), why the cloud is out."""

    exit_name: str | None
    confidence: float | None
    last: bool
    options: Sequence[Option]
    left_s: float
    cloud_refused: str | None


@dataclass(frozen=True, slots=True)
class Plan:
    """What to do, and why in one line."""

    route: Route
    why: str
    rate: int | None = None


def plan(situation: Situation, goal: Goal) -> Plan:
    """The next step of one input; a pure function of its arguments."""
    confidence = situation.confidence
    if confidence is not None and confidence >= goal.exit_confidence:
        return Plan("exit", f"{situation.exit_name} is {confidence:.3f} sure, {goal.exit_confidence:.3f} is enough")
    options = [o for o in situation.options if o.route == "continue" or o.seconds <= situation.left_s]
    if not options:
        reason = situation.cloud_refused or f"nothing answers within the {1000 * situation.left_s:.0f} ms left"
        return Plan("fallback", f"{reason}; {situation.exit_name} is the best there is")
    best = min(options, key=lambda option: option.seconds if goal.objective == "fastest" else option.usd)
    unsure = ""
    if confidence is not None:
        unsure = f"{situation.exit_name} is {confidence:.3f} sure, {goal.exit_confidence:.3f} needed; "
    if situation.cloud_refused and best.route == "continue":
        return Plan("continue", f"{unsure}{situation.cloud_refused}")
    others = ", ".join(describe(option) for option in options if option is not best)
    against = f" against {others}" if others else ""
    return Plan(best.route, f"{unsure}{goal.objective}: {describe(best)}{against}", best.rate)


def describe(option: Option) -> str:
    return f"{option.name} {1000 * option.seconds:.0f} ms {1e6 * option.usd:.2f} µ$"
