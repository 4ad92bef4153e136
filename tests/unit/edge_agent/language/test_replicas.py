from __future__ import annotations

import threading
from typing import Any

import pytest

from isthmus.edge_agent.language.replicas import MAX_IDLE_SESSIONS, MIN_REUSED_TOKENS, Replicas, SessionHandle
from isthmus.models.errors import AnswerCancelled, LinkDown
from tests.unit.edge_agent.language.scripted_cloud import bound

TEXT = tuple(range(100))


class Way:
    """A link's name and state."""

    def __init__(self, target: str, state: str = "closed") -> None:
        self.target, self.state = target, state
        self.reasons: list[str] = []
        self.closed = False

    def record_failure(self, reason: str) -> None:
        self.reasons.append(reason)

    def close(self) -> None:
        self.closed = True


def replicas(*ways: Any, wait_s: float = 0.05) -> Replicas:
    return Replicas(ways, bound(), wait_s)


def held(length: int, text: tuple[int, ...] = TEXT) -> SessionHandle:
    """A seat as an answer leaves it."""
    return SessionHandle(bytes([length]) * 16, "a", length, text)


def test_the_first_that_is_not_left_alone_is_the_best() -> None:
    ways = [Way("a", "open"), Way("b", "half_open"), Way("c")]
    chosen = replicas(*ways)
    assert chosen.best() is ways[1]
    ways[0].state = "closed"
    assert chosen.best() is ways[0]
    for way in ways:
        way.state = "open"
    assert chosen.best() is None
    assert list(chosen) == ways and chosen and not replicas()


def test_one_that_was_lost_is_told_and_goes_to_the_end_of_the_line() -> None:
    ways = [Way("a"), Way("b"), Way("c")]
    chosen = replicas(*ways)
    chosen.record_failure(ways[0], LinkDown("gone"))  # type: ignore[arg-type]
    assert list(chosen) == [ways[1], ways[2], ways[0]]
    assert [way.reasons for way in ways] == [["gone"], [], []]
    chosen.record_failure(ways[2], LinkDown("gone"))  # type: ignore[arg-type]
    assert list(chosen) == [ways[1], ways[0], ways[2]]


def test_waiting_ends_with_the_first_that_is_back() -> None:
    ways = [Way("a", "open"), Way("b", "open")]
    chosen = replicas(*ways, wait_s=10.0)
    looks = 0

    class NotCancelled(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            nonlocal looks
            looks += 1
            ways[1].state = "half_open" if looks == 3 else "open"
            return False

    assert chosen.wait(NotCancelled()) is ways[1]
    assert looks == 3, "it looks again until one is back, and no longer"


def test_waiting_ends_when_the_answer_is_given_up() -> None:
    cancelled = threading.Event()
    cancelled.set()
    with pytest.raises(AnswerCancelled):
        replicas(Way("a", "open"), wait_s=3600.0).wait(cancelled)


def test_waiting_has_an_end() -> None:
    with pytest.raises(LinkDown, match="no cloud answered"):
        replicas(Way("a", "open")).wait(threading.Event())


def test_a_new_seat_has_a_name_of_its_own() -> None:
    chosen = replicas()
    one, other = chosen.acquire(TEXT), chosen.acquire(TEXT)
    assert len(one.session) == 16 and one.session != other.session
    assert one.held == 0


def test_the_next_turn_sits_where_the_last_one_sat() -> None:
    chosen = replicas()
    seat = held(60)
    chosen.release(seat, TEXT)
    assert seat.tokens == TEXT[:60]
    again = chosen.acquire((*TEXT[:60], 7, 8))
    assert again is seat and again.held == 60
    assert chosen.acquire((*TEXT[:60], 7, 8)).session != seat.session  # taken out: two answers do not share one


def test_a_text_that_went_another_way_keeps_what_it_shares() -> None:
    chosen = replicas()
    chosen.release(held(60), TEXT)
    assert chosen.acquire((*TEXT[:40], 1, 1, 1)).held == 40


def test_one_token_at_least_is_left_to_bring() -> None:
    chosen = replicas()
    chosen.release(held(60), TEXT)
    assert chosen.acquire(TEXT[:60]).held == 59


def test_the_seat_that_shares_most_is_taken() -> None:
    chosen = replicas()
    for length in (30, 70, 50):
        chosen.release(held(length), TEXT)
    assert chosen.acquire(TEXT).held == 70
    assert chosen.acquire(TEXT).held == 50


def test_a_short_common_beginning_is_not_worth_a_seat() -> None:
    chosen = replicas()
    chosen.release(held(60), TEXT)
    assert chosen.acquire((*TEXT[: MIN_REUSED_TOKENS - 1], 99, 99)).held == 0
    assert chosen.acquire((*TEXT[:MIN_REUSED_TOKENS], 99, 99)).held == MIN_REUSED_TOKENS


def test_a_seat_that_holds_nothing_is_not_kept_and_old_ones_are_forgotten() -> None:
    chosen = replicas()
    chosen.release(held(0), TEXT)
    assert chosen.acquire(TEXT).held == 0
    for first in range(MAX_IDLE_SESSIONS + 1):
        chosen.release(held(20), (200 + first, *TEXT))
    assert chosen.acquire((200, *TEXT)).held == 0
    assert [chosen.acquire((200 + first, *TEXT)).held for first in range(1, MAX_IDLE_SESSIONS + 1)] == [
        20
    ] * MAX_IDLE_SESSIONS


def test_closing_closes_every_link() -> None:
    ways = [Way("a"), Way("b")]
    replicas(*ways).close()
    assert [way.closed for way in ways] == [True, True]
