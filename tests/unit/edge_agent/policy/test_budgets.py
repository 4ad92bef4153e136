from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.edge_agent.policy.budgets import (
    DAY_S,
    HOUR_S,
    UNLIMITED,
    Bucket,
    Budget,
    Spend,
    allowance,
    describe_shortage,
    shortage,
)

BYTES = Budget("bytes", 1000, HOUR_S)


@given(st.sampled_from(["bytes", "usd", "calls"]), st.integers(1, 10_000), st.sampled_from([HOUR_S, DAY_S]))
def test_a_bucket_that_is_emptied_at_once_and_then_as_it_fills_stays_within_the_limit(
    amount: str, limit: int, period_s: float
) -> None:
    budget = Budget(amount, limit, period_s)  # type: ignore[arg-type]
    step = 1.0 if amount == "calls" else 0.0
    assert budget.capacity + budget.per_s * period_s <= limit + step
    if step:  # whole calls: the n-th is possible when capacity + per_s * t >= n
        most = math.ceil(budget.capacity + budget.per_s * period_s) - 1
        assert most <= limit
        assert limit < 3 or most >= 0.9 * limit, "little of the budget is left unused"


def test_one_call_an_hour_is_one_call_an_hour() -> None:
    bucket = Bucket(Budget("calls", 1, HOUR_S), 1.0).reserved(1.0)
    assert bucket is not None
    bucket = bucket.settled(1.0, 1.0)
    assert bucket.refilled(HOUR_S - 1).reserved(1.0) is None
    assert bucket.refilled(HOUR_S + 1).reserved(1.0) is not None


def test_what_is_reserved_takes_its_place_so_that_giving_back_never_overfills() -> None:
    bucket = Bucket(BYTES, BYTES.capacity)
    reserved = bucket.reserved(60)
    assert reserved is not None and (reserved.level, reserved.held) == (40, 60)
    assert reserved.refilled(10 * HOUR_S).level == 40, "full beside what is held"
    assert reserved.settled(60, 25).level == 75
    assert bucket.reserved(101) is None, "more than the bucket ever holds"


def test_more_than_was_reserved_becomes_a_debt() -> None:
    bucket = Bucket(BYTES, 10.0, 5.0).settled(5, 50)
    assert bucket.level == -35 and bucket.reserved(0.0) is None


def test_a_smaller_limit_takes_what_is_above_it() -> None:
    assert replace(Bucket(BYTES, 100.0), budget=Budget("bytes", 100, HOUR_S)).refilled(0).level == 10


def test_allowance_is_the_least_of_each_amount_and_shortage_names_the_first_that_lacks() -> None:
    left = allowance([Bucket(BYTES, 50.0), Bucket(Budget("bytes", 9000, DAY_S), 20.0)])
    assert left == Spend(20.0, math.inf, math.inf, math.inf)
    assert allowance([]) == UNLIMITED and shortage(Spend(1e12, 1e6, 1e6, 9), UNLIMITED) is None
    assert shortage(Spend(21), left) == "bytes"
    for amount in ("bytes", "usd", "joules", "calls"):
        assert shortage(Spend(**{amount: 1.0}), UNLIMITED._replace(**{amount: 0.5})) == amount


@pytest.mark.parametrize(
    ("spend", "left", "said"),
    [
        (Spend(939), Spend(120.0, 1, 1, 1), "the budget of bytes has 120 B left, 939 needed"),
        (Spend(calls=1), Spend(1, 1, 1, 0), "the budget of calls has 0 calls left, 1 needed"),
        (Spend(usd=2e-6), Spend(1, 1e-6, 1, 1), "the budget of usd has 1 µ$ left, 2 needed"),
    ],
)
def test_a_shortage_is_told_in_units_for_people(spend: Spend, left: Spend, said: str) -> None:
    assert describe_shortage(spend, left) == said


def test_a_budget_has_a_name() -> None:
    assert Budget("calls", 5, DAY_S).name == "calls per day"
