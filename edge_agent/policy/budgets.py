"""Hard budgets: at most so many bytes, dollars, modelled joules or cloud calls in any hour or day. Pure.

Each budget is a token bucket that holds `capacity` at most and gains `per_s`:

    spent in any period  <=  capacity + per_s * period  <=  limit

so that the budget is spent evenly, whichever moment an hour is counted from. What is reserved counts as spent until it
is settled, and takes its place in the bucket meanwhile: giving some back never makes the bucket hold more.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple, get_args

Amount = Literal["bytes", "usd", "joules", "calls"]
AMOUNTS: tuple[Amount, ...] = get_args(Amount)
HOUR_S, DAY_S = 3600.0, 86400.0
PERIODS = {HOUR_S: "hour", DAY_S: "day"}
UNITS: dict[Amount, tuple[str, float]] = {  # for people: unit, and how many of it are one
    "bytes": ("B", 1.0),
    "usd": ("µ$", 1e6),
    "joules": ("mJ modelled", 1e3),
    "calls": ("calls", 1.0),
}
BURST = 0.1  # of a budget that may be spent at once; the rest comes evenly over the period
ROUNDING = 1e-9  # share that is held back, so that rounding never spends more than the limit


class Spend(NamedTuple):
    """What an answer takes: whole messages in bytes, US dollars, modelled joules, calls of a cloud."""

    bytes: float = 0.0
    usd: float = 0.0
    joules: float = 0.0
    calls: float = 0.0

    def plus(self, other: Spend) -> Spend:
        """Both together."""
        return Spend(*(mine + theirs for mine, theirs in zip(self, other, strict=True)))

    def beyond(self, other: Spend) -> Spend:
        """What it takes more than the other of each amount."""
        return Spend(*(max(mine - theirs, 0.0) for mine, theirs in zip(self, other, strict=True)))


UNLIMITED = Spend(math.inf, math.inf, math.inf, math.inf)


@dataclass(frozen=True, slots=True)
class Budget:
    """At most `limit` of an amount in any `period_s`, a half-open span of time."""

    amount: Amount
    limit: float
    period_s: float
    capacity: float = field(init=False)  # what may be spent at once
    per_s: float = field(init=False)  # what is gained in a second

    def __post_init__(self) -> None:
        least = 1.0 if self.amount == "calls" else 0.0  # a call is not divided
        capacity = max(BURST * self.limit, least)
        object.__setattr__(self, "capacity", capacity)
        object.__setattr__(self, "per_s", (self.limit - capacity + least) * (1 - ROUNDING) / self.period_s)

    @property
    def name(self) -> str:
        """For example "bytes per day"."""
        return f"{self.amount} per {PERIODS.get(self.period_s, f'{self.period_s:g} s')}"


@dataclass(frozen=True, slots=True)
class Bucket:
    """What is left of a budget to be spent now, and what reservations hold."""

    budget: Budget
    level: float
    held: float = 0.0

    def refilled(self, seconds: float) -> Bucket:
        """After so many seconds."""
        gained = self.level + self.budget.per_s * max(seconds, 0.0)
        return replace(self, level=min(gained, self.budget.capacity - self.held))

    def reserved(self, amount: float) -> Bucket | None:
        """With `amount` held; None where less is left."""
        if amount > self.level:
            return None
        return replace(self, level=self.level - amount, held=self.held + amount)

    def settled(self, amount: float, spent: float) -> Bucket:
        """After a reservation of `amount`, of which `spent` was spent. More than was reserved becomes a debt."""
        return replace(self, level=self.level + amount - spent, held=max(self.held - amount, 0.0))


def allowance(buckets: Sequence[Bucket], seconds: float = 0.0) -> Spend:
    """What may be spent of each amount after so many seconds; infinite where there is no budget."""
    left = dict.fromkeys(AMOUNTS, math.inf)
    for bucket in buckets:
        level, budget = bucket.level, bucket.budget
        if seconds > 0:
            level = min(level + budget.per_s * seconds, budget.capacity - bucket.held)
        left[budget.amount] = min(left[budget.amount], level)
    return Spend(**left)


def shortage(spend: Spend, left: Spend) -> Amount | None:
    """The first amount of which `spend` needs more than is `left`; None if all suffice."""
    if spend.bytes > left.bytes:
        return "bytes"
    if spend.calls > left.calls:
        return "calls"
    if spend.usd > left.usd:
        return "usd"
    return "joules" if spend.joules > left.joules else None


def describe_shortage(spend: Spend, left: Spend) -> str:
    """For example "the budget of bytes has 120 B left, 939 needed"."""
    amount = shortage(spend, left)
    assert amount is not None  # asked only where there is one
    unit, scale = UNITS[amount]
    has, needs = (scale * max(float(getattr(each, amount)), 0.0) for each in (left, spend))
    return f"the budget of {amount} has {has:.5g} {unit} left, {needs:.5g} needed"
