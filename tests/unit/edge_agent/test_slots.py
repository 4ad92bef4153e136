"""Slots are granted in order of arrival, whatever interrupts those who wait."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from isthmus.edge_agent.slots import FairSlots


def test_a_slot_is_handed_over_in_order_of_arrival() -> None:
    """A thread that takes it again at once waits behind those that came before."""
    slots, order = FairSlots(1), list[str]()
    waits = [threading.Event() for _ in range(3)]

    def take(name: str, arrived: threading.Event) -> None:
        arrived.set()
        with slots:
            order.append(name)

    with ThreadPoolExecutor(3) as threads:
        with slots:
            for name, arrived in zip("abc", waits, strict=True):
                threads.submit(take, name, arrived)
                arrived.wait(10)
                while len(slots._waiting) < "abc".index(name) + 1:
                    pass
        with slots:
            order.append("first again")
    assert order == ["a", "b", "c", "first again"]


def test_an_interrupted_wait_gives_its_turn_away(monkeypatch: pytest.MonkeyPatch) -> None:
    slots = FairSlots(1)

    def interrupted(self: threading.Event, timeout: float | None = None) -> bool:
        raise KeyboardInterrupt

    with slots:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Event, "wait", interrupted)
            with pytest.raises(KeyboardInterrupt):
                slots.__enter__()
        assert not slots._waiting
    with slots:
        pass


def test_a_turn_that_comes_with_the_interrupt_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    slots = FairSlots(1)
    slots.__enter__()

    def handed_over(self: threading.Event, timeout: float | None = None) -> bool:
        slots.__exit__()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(threading.Event, "wait", handed_over)
        with pytest.raises(KeyboardInterrupt):
            slots.__enter__()
    with ThreadPoolExecutor(1) as threads:
        assert threads.submit(lambda: slots.__enter__() or slots.__exit__() or "free").result(10) == "free"


def test_a_wait_that_ends_in_vain_takes_no_slot() -> None:
    slots = FairSlots(2)
    assert slots.acquire(0) and not slots.full and slots.acquire(0)
    assert slots.full and not slots.acquire(0.001) and not slots._waiting
    slots.release()
    assert slots.acquire(0)


def test_who_is_urgent_comes_first_and_more_slots_let_more_in() -> None:
    slots, order = FairSlots(1), list[str]()
    slots.acquire()

    def take(name: str) -> None:
        slots.acquire(urgent=name == "urgent")
        order.append(name)

    threads = [threading.Thread(target=take, args=[name]) for name in ("first", "urgent")]
    for count, thread in enumerate(threads, 1):
        thread.start()
        while len(slots._waiting) < count:
            pass
    slots.release()
    threads[1].join(10)
    assert order == ["urgent"]
    slots.resize(2)
    threads[0].join(10)
    assert order == ["urgent", "first"] and slots.full
