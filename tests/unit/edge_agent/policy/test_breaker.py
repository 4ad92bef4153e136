from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.edge_agent.policy.breaker import Breaker, BreakerLimits

LIMITS = BreakerLimits(failures=3, first_s=1.0, last_s=4.0)


def closed() -> Breaker:
    breaker = Breaker(LIMITS)
    breaker.record_probe(True, 0.0)
    assert breaker.allow_request()
    breaker.record_success()
    return breaker


def test_starts_open_and_wants_a_probe_at_once() -> None:
    breaker = Breaker(LIMITS)
    assert breaker.state == "open"
    assert not breaker.allow_request()
    assert breaker.probe_at_s <= 0


def test_a_probe_lets_one_request_through_and_its_success_closes() -> None:
    breaker = Breaker(LIMITS)
    breaker.record_probe(True, 0.0)
    assert [breaker.allow_request(), breaker.allow_request()] == [True, False]
    breaker.record_success()
    assert breaker.state == "closed"
    assert breaker.allow_request() and breaker.allow_request()


def test_a_failed_trial_opens_it_again() -> None:
    breaker = Breaker(LIMITS)
    breaker.record_probe(True, 0.0)
    breaker.allow_request()
    breaker.record_failure(5.0)
    assert breaker.state == "open"
    assert breaker.probe_at_s == 6.0


def test_only_failures_in_a_row_count() -> None:
    breaker = closed()
    for _ in range(5):
        breaker.record_failure(0.0)
        breaker.record_failure(0.0)
        breaker.record_success()
    assert breaker.state == "closed"
    for _ in range(3):
        breaker.record_failure(0.0)
    assert breaker.state == "open"


def test_cool_down_doubles_up_to_its_cap_and_starts_over_after_a_success() -> None:
    breaker = closed()
    for _ in range(3):
        breaker.record_failure(0.0)
    waits = [breaker.probe_at_s]
    for _ in range(3):
        now_s = breaker.probe_at_s
        breaker.record_probe(False, now_s)
        waits.append(breaker.probe_at_s - now_s)
    assert waits == [1.0, 2.0, 4.0, 4.0]
    breaker.record_probe(True, 20.0)
    breaker.allow_request()
    breaker.record_success()
    for _ in range(3):
        breaker.record_failure(30.0)
    assert breaker.probe_at_s == 31.0


def test_answers_that_come_in_after_it_opened_change_nothing() -> None:
    breaker = closed()
    for _ in range(3):
        breaker.record_failure(0.0)
    breaker.record_success()
    breaker.record_failure(0.5)
    assert breaker.state == "open"
    assert breaker.probe_at_s == 1.0


@pytest.mark.parametrize("answered", [True, False])
def test_a_probe_of_a_closed_breaker_is_ignored(answered: bool) -> None:
    breaker = closed()
    breaker.record_probe(answered, 9.0)
    assert breaker.state == "closed"


class Model:
    """The breaker once more, as a table: what each event does in each state."""

    def __init__(self) -> None:
        self.state, self.row, self.trial, self.cooldown_s, self.probe_at_s = "open", 0, False, 1.0, float("-inf")

    def event(self, name: str, now_s: float) -> bool | None:
        match self.state, name:
            case "closed", "take":
                return True
            case "half_open", "take":
                first, self.trial = not self.trial, True
                return first
            case "open", "take":
                return False
            case (("closed" | "half_open"), "ok"):
                self.state, self.row, self.cooldown_s = "closed", 0, 1.0
            case "closed", "fail" if self.row < 2:
                self.row += 1
            case (("closed" | "half_open"), "fail") | ("open", "probe fail"):
                self.state, self.row, self.probe_at_s = "open", 0, now_s + self.cooldown_s
                self.cooldown_s = min(2 * self.cooldown_s, 4.0)
            case "open", "probe ok":
                self.state, self.trial, self.row = "half_open", False, 0
        return None


@given(st.lists(st.sampled_from(["take", "ok", "fail", "probe ok", "probe fail"]), max_size=60))
def test_every_history_is_the_models(events: list[str]) -> None:
    breaker, model = Breaker(LIMITS), Model()
    for now_s, event in enumerate(events):
        expected = model.event(event, now_s)
        match event:
            case "take":
                assert breaker.allow_request() is expected
            case "ok":
                breaker.record_success()
            case "fail":
                breaker.record_failure(now_s)
            case _:
                breaker.record_probe(event == "probe ok", now_s)
        assert (breaker.state, breaker.probe_at_s) == (model.state, model.probe_at_s)


def test_a_request_that_says_nothing_gives_the_trial_back() -> None:
    breaker = Breaker(LIMITS)
    breaker.record_probe(True, 0.0)
    assert breaker.allow_request() and not breaker.allow_request()
    breaker.record_nothing()
    assert breaker.state == "half_open" and breaker.allow_request()


def test_a_request_that_says_nothing_is_no_success_in_a_row_of_failures() -> None:
    breaker = closed()
    for _ in range(3):
        breaker.record_nothing()
        breaker.record_failure(0.0)
    assert breaker.state == "open"


def test_a_trip_opens_at_once_and_a_second_one_changes_nothing() -> None:
    breaker = closed()
    breaker.trip(5.0)
    breaker.trip(5.5)
    assert (breaker.state, breaker.probe_at_s) == ("open", 6.0)


def test_requests_in_flight_together_fail_together_and_count_once() -> None:
    breaker = closed()
    for now_s in (5.0, 5.1, 5.2, 5.3):
        breaker.record_failure(now_s, sent_s=4.0)
    assert breaker.state == "closed"
    breaker.record_failure(6.0, sent_s=5.5)
    breaker.record_failure(7.0, sent_s=6.5)
    assert breaker.state == "open"
    breaker.record_probe(True, 8.0)
    breaker.record_failure(8.5, sent_s=6.9)
    assert breaker.state == "half_open", "it was sent before the breaker opened"
