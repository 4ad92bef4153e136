"""More requests in flight while they are answered in time, half as many for each burst that is late."""

from __future__ import annotations

from isthmus.edge_agent.policy.window import FIRST, MOST, Window


def test_it_grows_by_one_for_a_window_of_answers_and_only_while_it_is_full() -> None:
    window = Window()
    for _ in range(100):
        window.answered(full=False)
    assert window.size == FIRST
    for _ in range(int(FIRST) + 1):
        window.answered(full=True)
    assert window.size == FIRST + 1
    for _ in range(10_000):
        window.answered(full=True)
    assert window.size == MOST


def test_requests_that_are_late_together_halve_it_once_and_one_always_has_room() -> None:
    window = Window()
    for _ in range(8):
        window.overloaded(sent_s=1.0, now_s=2.0)
    assert window.size == FIRST / 2
    for second in range(3, 20):
        window.overloaded(sent_s=second, now_s=second + 0.5)
    assert window.size == 1
