from __future__ import annotations

import pytest

from isthmus.cloud_service import quotas as module
from isthmus.cloud_service.quotas import BURST_S, Quota, Quotas, Usage
from isthmus.models.errors import InvalidInput, Overloaded


def taken(quotas: Quotas, quota: Quota, usage: Usage, times: list[float], peer: str = "a") -> int:
    """How many of the messages at these times are taken."""
    count = 0
    for now_s in times:
        try:
            quotas.take(peer, quota, usage, now_s)
        except Overloaded:
            continue
        count += 1
    return count


def test_over_a_long_time_a_device_gets_its_rate_and_a_burst() -> None:
    quotas, quota = Quotas(), Quota(requests_per_s=5)
    assert taken(quotas, quota, Usage(1), [0.0] * 100) == 5 * BURST_S
    assert taken(quotas, quota, Usage(1), [0.01 * step for step in range(1, 1001)]) in (
        50,
        51,
    )  # the last is paid later
    assert taken(quotas, quota, Usage(1), [10.0] * 100, peer="b") == 5 * BURST_S


def test_a_message_larger_than_the_burst_is_taken_and_paid_for_afterwards() -> None:
    quotas, quota = Quotas(), Quota(bytes_per_s=1000)
    quotas.take("a", quota, Usage(1, 12_000), 0.0)
    with pytest.raises(Overloaded, match="quota of 1000 bytes a second is used up") as caught:
        quotas.take("a", quota, Usage(1, 1), 1.0)
    assert caught.value.retry_s == pytest.approx(9.0, abs=0.01)
    quotas.take("a", quota, Usage(1, 1), 1.0 + caught.value.retry_s)


def test_what_is_used_counts_without_a_question_and_what_is_not_limited_costs_nothing() -> None:
    quotas, quota = Quotas(), Quota(tokens_per_s=10)
    quotas.take("a", quota, Usage(tokens=1000), 0.0, used=True)
    with pytest.raises(Overloaded, match="tokens"):
        quotas.take("a", quota, Usage(1), 1.0)
    assert taken(quotas, Quota(), Usage(1, 1 << 30, 1 << 30), [0.0] * 1000) == 1000


def test_a_clock_that_stands_still_gives_nothing() -> None:
    quotas, quota = Quotas(), Quota(requests_per_s=1)
    assert taken(quotas, quota, Usage(1), [5.0] * 10) == BURST_S


def test_the_levels_of_quiet_devices_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_DEVICES", 10)
    quotas, quota = Quotas(), Quota(requests_per_s=1)
    for number in range(100):
        quotas.take(f"device {number}", quota, Usage(1), 1000.0 * number)
    assert len(quotas._levels) <= 10


@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf")])
def test_a_quota_is_a_positive_number(value: float) -> None:
    with pytest.raises(InvalidInput, match="requests_per_s"):
        Quota(requests_per_s=value)
