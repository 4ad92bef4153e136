from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.policy.breaker import STATES, Breaker, BreakerLimits

LIMITS = BreakerLimits(failures=3, first_s=1.0, last_s=4.0)


def closed() -> Breaker:
    breaker = Breaker(LIMITS)
    breaker.probed(True, 0.0)
    assert breaker.take()
    breaker.succeeded()
    return breaker


def test_starts_open_and_wants_a_probe_at_once() -> None:
    breaker = Breaker(LIMITS)
    assert breaker.state == "open"
    assert not breaker.take()
    assert breaker.probe_at_s <= 0


def test_a_probe_lets_one_request_through_and_its_success_closes() -> None:
    breaker = Breaker(LIMITS)
    breaker.probed(True, 0.0)
    assert [breaker.take(), breaker.take()] == [True, False]
    breaker.succeeded()
    assert breaker.state == "closed"
    assert breaker.take() and breaker.take()


def test_a_failed_trial_opens_it_again() -> None:
    breaker = Breaker(LIMITS)
    breaker.probed(True, 0.0)
    breaker.take()
    breaker.failed(5.0)
    assert breaker.state == "open"
    assert breaker.probe_at_s == 6.0


def test_only_failures_in_a_row_count() -> None:
    breaker = closed()
    for _ in range(5):
        breaker.failed(0.0)
        breaker.failed(0.0)
        breaker.succeeded()
    assert breaker.state == "closed"
    for _ in range(3):
        breaker.failed(0.0)
    assert breaker.state == "open"


def test_cool_down_doubles_up_to_its_cap_and_starts_over_after_a_success() -> None:
    breaker = closed()
    for _ in range(3):
        breaker.failed(0.0)
    waits = [breaker.probe_at_s]
    for _ in range(3):
        now_s = breaker.probe_at_s
        breaker.probed(False, now_s)
        waits.append(breaker.probe_at_s - now_s)
    assert waits == [1.0, 2.0, 4.0, 4.0]
    breaker.probed(True, 20.0)
    breaker.take()
    breaker.succeeded()
    for _ in range(3):
        breaker.failed(30.0)
    assert breaker.probe_at_s == 31.0


def test_answers_that_come_in_after_it_opened_change_nothing() -> None:
    breaker = closed()
    for _ in range(3):
        breaker.failed(0.0)
    breaker.succeeded()
    breaker.failed(0.5)
    assert breaker.state == "open"
    assert breaker.probe_at_s == 1.0


@pytest.mark.parametrize("answered", [True, False])
def test_a_probe_of_a_closed_breaker_is_ignored(answered: bool) -> None:
    breaker = closed()
    breaker.probed(answered, 9.0)
    assert breaker.state == "closed"


@given(st.lists(st.sampled_from(["take", "ok", "fail", "probe ok", "probe fail"]), max_size=60))
def test_an_open_breaker_lets_nothing_through_whatever_happened(events: list[str]) -> None:
    breaker, now_s = Breaker(LIMITS), 0.0
    for event in events:
        now_s += 1.0
        if event == "take":
            assert breaker.take() in ((False,) if breaker.state == "open" else (True, False))
        elif event == "ok":
            breaker.succeeded()
        elif event == "fail":
            breaker.failed(now_s)
        else:
            breaker.probed(event == "probe ok", now_s)
        assert breaker.state in STATES
        if breaker.state == "open":
            assert breaker.probe_at_s <= now_s + LIMITS.last_s
