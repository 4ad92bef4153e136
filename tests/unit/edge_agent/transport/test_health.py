"""Requests take turns on the uplink, and one that waits long behind others halves what is in flight."""

from __future__ import annotations

import threading

import pytest

from isthmus.edge_agent.policy.breaker import BreakerLimits
from isthmus.edge_agent.policy.exploration import ProbeSchedule
from isthmus.edge_agent.transport.health import MAX_QUEUED_S, Attempt, CloudHealth
from isthmus.models.errors import Overloaded
from isthmus.models.messages import CloudReply


@pytest.fixture
def health() -> CloudHealth:
    found = CloudHealth(BreakerLimits(), lambda: None, ProbeSchedule(0))
    found.record_probe(None)
    return found


def test_the_next_request_is_sent_after_the_one_before(health: CloudHealth) -> None:
    first, second, sent = Attempt(30.0), Attempt(30.0), threading.Event()
    health.await_uplink(first, 100)
    waiting = threading.Thread(target=lambda: (health.await_uplink(second, 100), sent.set()))
    waiting.start()
    assert not sent.wait(0.05)
    first.sent(100)
    first.give_turn()  # once is enough
    assert sent.wait(10)
    second.give_turn()


def test_a_turn_that_comes_too_late_is_no_turn(health: CloudHealth) -> None:
    first = Attempt(30.0)
    health.await_uplink(first, 100)
    with pytest.raises(Overloaded, match="on their way up"):
        health.await_uplink(Attempt(0.01), 100)
    first.give_turn()


def test_a_long_wait_behind_others_halves_the_window(health: CloudHealth) -> None:
    reply = CloudReply(probabilities=(), queue_s=0.0, compute_s=0.1)
    before = health._window.size
    health.record_reply(reply, 0.2 + MAX_QUEUED_S, up=20_000, down=100, ahead=0.0)
    assert health._window.size == before  # alone: the link is slow, and one at a time is what it takes
    health.record_reply(reply, 0.2 + MAX_QUEUED_S, up=20_000, down=100, ahead=40_000.0)
    assert health._window.size == before // 2
