from __future__ import annotations

import pytest

from isthmus.edge_agent.language import charges as module
from isthmus.edge_agent.language.charges import LOGPROB_BYTES, PAUSE_S, SPARE_S, TOKEN_BYTES, StreamCharges, Tariff
from isthmus.edge_agent.ledger import Ledger
from isthmus.edge_agent.policy.budgets import BURST, HOUR_S, Amount, Budget, Spend
from isthmus.edge_agent.policy.prices import CostProfile, Energy, Prices
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


def test_a_message_reserves_what_its_reply_may_have(clock: Time) -> None:
    ledger = ledger_of(bytes=1e6, calls=100)
    charges = StreamCharges(Tariff(ledger, PROFILE), logprobs=3)
    charges.before_sending(500, 0)
    charges.before_sending(40, 5)
    reply_bytes = 5 * (TOKEN_BYTES + 3 * LOGPROB_BYTES) + 2 * MAX_ERROR_CHARACTERS
    assert left(ledger, "bytes") == pytest.approx(1e6 * BURST - 540 - reply_bytes, abs=1)
    assert left(ledger, "calls") == pytest.approx(100 * BURST - 1, abs=0.01), "an opening is no call"


def test_a_stream_that_was_answered_has_spent_what_it_carried(clock: Time) -> None:
    ledger = ledger_of(bytes=1e6, usd=10, joules=100, calls=100)
    charges = StreamCharges(Tariff(ledger, PROFILE), logprobs=0)
    charges.before_sending(500, 0)
    charges.before_sending(40, 5)
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
    charges = StreamCharges(Tariff(ledger, PROFILE), logprobs=0)
    charges.before_sending(40, 5)
    before = left(ledger, "bytes")
    charges.close(40, 0, due=True)
    assert left(ledger, "bytes") == pytest.approx(before, abs=1)


def test_a_wild_time_claimed_by_the_cloud_counts_as_the_time_that_passed(clock: Time) -> None:
    ledger = ledger_of(usd=100)
    charges = StreamCharges(Tariff(ledger, PROFILE), logprobs=0)
    charges.before_sending(0, 1)
    clock.now_s += 1.0
    charges.replied(Committed(1, tokens=(1,), compute_s=4e9))
    charges.close(0, 0, due=False)
    assert ledger.totals.spent.usd == pytest.approx(1e-3 + 1e-4)


def test_time_is_reserved_while_it_passes_and_a_readers_pause_is_not_counted(clock: Time) -> None:
    ledger = ledger_of(joules=1000)
    charges = StreamCharges(Tariff(ledger, PROFILE), logprobs=0)
    charges.before_sending(0, 1)
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
    charges = StreamCharges(Tariff(ledger_of(**{amount: limit}), PROFILE), logprobs=0)
    with pytest.raises(OverBudget, match=f"the budget of {amount} has"):
        for _ in range(100):
            charges.before_sending(200, 10)
            clock.now_s += 1.0


def test_probes_pay(clock: Time) -> None:
    tariff = Tariff(ledger_of(bytes=30_000), PROFILE)
    assert tariff.probe(2000) and not tariff.probe(2000)
    assert tariff.ledger.totals.spent.bytes == 2000
