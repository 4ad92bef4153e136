from __future__ import annotations

import pytest

from isthmus.edge_agent.language import charges as module
from isthmus.edge_agent.language.charges import (
    LOGPROB_BYTES,
    PAUSE_S,
    REPLY_BYTES,
    SPARE_S,
    TOKEN_BYTES,
    StreamCharges,
    Tariff,
)
from isthmus.edge_agent.ledger import Ledger
from isthmus.edge_agent.policy.budgets import BURST, HOUR_S, Amount, Budget, Spend
from isthmus.edge_agent.policy.prices import CostProfile, Energy, Prices
from isthmus.edge_agent.transport.generate_stream import Traffic
from isthmus.models.errors import OverBudget
from isthmus.models.messages import Committed
from isthmus.protos.limits import MAX_ERROR_CHARACTERS

PROFILE = CostProfile("test", Prices(1e-6, 1e-3, usd_per_token=1e-4), Energy(1.0, 0.5, 2e-6, 1e-6, 0.0, 0.0))


class Time:
    """In place of the module `time`."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def monotonic(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Time:
    clock = Time()
    monkeypatch.setattr(module, "time", clock)
    return clock


def ledger_of(**limits: float) -> Ledger:
    return Ledger([Budget(amount, limit, HOUR_S) for amount, limit in limits.items()])  # type: ignore[arg-type]


def left(ledger: Ledger, amount: Amount) -> float:
    return next(bucket.level for bucket in ledger.buckets() if bucket.budget.amount == amount)


def message(up_bytes: int, down_bytes: int = 0, rounds: int = 1, replies: int = 2, tokens: int = 5) -> Traffic:
    return Traffic(up_bytes, down_bytes, rounds, replies, tokens)


def opened(ledger: Ledger, logprobs: int = 0) -> StreamCharges:
    return StreamCharges(Tariff(ledger, PROFILE), logprobs)


def test_a_message_reserves_what_its_replies_may_have(clock: Time) -> None:
    ledger = ledger_of(bytes=1e6, calls=100)
    charges = opened(ledger, logprobs=3)
    charges.before_sending(message(500, rounds=0, replies=0, tokens=0))
    charges.before_sending(message(540))
    coming = 2 * REPLY_BYTES + 5 * (TOKEN_BYTES + 3 * LOGPROB_BYTES) + MAX_ERROR_CHARACTERS
    assert left(ledger, "bytes") == pytest.approx(1e6 * BURST - 540 - coming, abs=1)
    assert left(ledger, "calls") == pytest.approx(100 * BURST - 1, abs=0.01), "an opening is no call"


def test_what_has_come_gives_its_place_to_what_is_due_next(clock: Time) -> None:
    """Or a long answer would reserve its replies again and again."""
    ledger = ledger_of(bytes=1e6)
    charges = opened(ledger)
    for rounds in range(1, 101):
        charges.before_sending(message(40 * rounds, 50 * (rounds - 1), rounds))
        charges.replied(Committed(1, tokens=(1, 2)))
    coming = 2 * REPLY_BYTES + 5 * TOKEN_BYTES + MAX_ERROR_CHARACTERS
    assert left(ledger, "bytes") == pytest.approx(1e6 * BURST - 40 * 100 - 50 * 99 - coming, abs=1)


def test_a_stream_that_was_answered_has_spent_what_it_carried(clock: Time) -> None:
    ledger = ledger_of(bytes=1e6, usd=10, joules=100, calls=100)
    charges = opened(ledger)
    charges.before_sending(message(500, rounds=0, replies=0, tokens=0))
    charges.before_sending(message(540))
    clock.now_s += 1.0
    charges.replied(Committed(10, tokens=(1, 2, 3), queue_s=0.1, compute_s=0.3))
    charges.close(540, 70, due=False)
    spent = ledger.totals.spent
    assert spent == pytest.approx(Spend(610, 540e-6 + 0.4e-3 + 3e-4, 540 * 2e-6 + 70e-6 + 0.5 * 1.0, 1.0))
    assert left(ledger, "bytes") == pytest.approx(1e6 * BURST - 610, abs=1)
    charges.close(540, 70, due=False)
    assert ledger.totals.spent == spent, "once"


def test_a_stream_that_is_given_up_has_spent_all_that_was_reserved(clock: Time) -> None:
    ledger = ledger_of(bytes=1e6)
    charges = opened(ledger)
    charges.before_sending(message(40))
    before = left(ledger, "bytes")
    charges.close(40, 0, due=True)
    assert left(ledger, "bytes") == pytest.approx(before, abs=1)


def test_a_wild_time_claimed_by_the_cloud_counts_as_the_time_that_passed(clock: Time) -> None:
    ledger = ledger_of(usd=100)
    charges = opened(ledger)
    charges.before_sending(message(0))
    clock.now_s += 1.0
    charges.replied(Committed(1, tokens=(1,), compute_s=4e9))
    charges.close(0, 0, due=False)
    assert ledger.totals.spent.usd == pytest.approx(1e-3 + 1e-4)


def test_time_is_reserved_while_it_passes_and_a_readers_pause_is_not_counted(clock: Time) -> None:
    ledger = ledger_of(joules=1000)
    charges = opened(ledger)
    charges.before_sending(message(0))
    full = 1000 * BURST
    assert full - left(ledger, "joules") == pytest.approx(0.5 * (PAUSE_S + SPARE_S), rel=0.01)
    for _ in range(30):
        clock.now_s += 1.0
        charges.waits()
    assert full - left(ledger, "joules") >= 0.5 * (30 + PAUSE_S)
    charges.replied(Committed(1, tokens=(1,)))
    clock.now_s += 3600.0
    charges.close(0, 0, due=False)
    assert ledger.totals.spent.joules == pytest.approx(0.5 * (30 + PAUSE_S), rel=0.01)


@pytest.mark.parametrize("amount", ["bytes", "usd", "joules", "calls"])
def test_a_budget_that_is_used_up_keeps_the_message_from_being_sent(clock: Time, amount: Amount) -> None:
    limit = {"bytes": 9e3, "usd": 0.02, "joules": 30.0, "calls": 10}[amount]
    charges = opened(ledger_of(**{amount: limit}))
    with pytest.raises(OverBudget, match=f"the budget of {amount} has"):
        for rounds in range(1, 100):
            charges.before_sending(message(200 * rounds, 0, rounds))
            clock.now_s += 1.0
