from __future__ import annotations

from collections.abc import Collection

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.cloud_service.language.kv_budget import KVBudget

NAMES = [bytes([letter]) for letter in b"abcdef"]


def ledger(*sessions: tuple[bytes, int, float, bool], budget_bytes: int = 100) -> KVBudget:
    """Of (name, size, used, attached)."""
    contexts = KVBudget(budget_bytes, idle_s=10.0)
    for name, size_bytes, used_s, attached in sessions:
        contexts.record(name, size_bytes, used_s, attached=attached)
    return contexts


def test_nobody_is_evicted_while_there_is_room() -> None:
    contexts = ledger((b"a", 40, 1.0, True))
    assert contexts.victims(b"b", 60, keep=()) == []
    assert contexts.victims(b"b", 61, keep=()) == [b"a"]


def test_a_session_makes_room_for_itself_by_what_it_has() -> None:
    contexts = ledger((b"a", 60, 1.0, True), (b"b", 40, 2.0, True))
    assert contexts.victims(b"a", 60, keep=()) == []
    assert contexts.victims(b"a", 61, keep=()) == [b"b"]


def test_the_unconnected_go_first_then_the_least_recently_used() -> None:
    connected = [(b"a", 20, 5.0, True), (b"b", 20, 1.0, True), (b"e", 20, 2.0, True)]
    contexts = ledger(*connected, (b"c", 20, 9.0, False), (b"d", 20, 8.0, False))
    assert contexts.victims(b"f", 100, keep=()) == [b"d", b"c", b"b", b"e", b"a"]
    assert contexts.victims(b"f", 50, keep=(b"c",)) == [b"d", b"b", b"e"]


def test_late_ones_are_evicted_after_all_others_the_last_of_them_first() -> None:
    contexts = ledger((b"a", 25, 1.0, False), (b"b", 25, 2.0, True), (b"c", 25, 9.0, True), (b"d", 25, 8.0, True))
    assert contexts.victims(b"e", 25, keep=(), late=(b"a", b"b")) == [b"d"]
    assert contexts.victims(b"e", 100, keep=(), late=(b"a", b"b")) == [b"d", b"c", b"b", b"a"]


def test_no_more_are_evicted_than_needed() -> None:
    contexts = ledger((b"a", 50, 1.0, False), (b"b", 50, 2.0, False))
    assert contexts.victims(b"c", 50, keep=()) == [b"a"]


def test_what_cannot_fit_evicts_nobody() -> None:
    contexts = ledger((b"a", 50, 1.0, False), (b"b", 50, 2.0, True))
    assert contexts.victims(b"c", 101, keep=()) is None
    assert contexts.victims(b"c", 51, keep=(b"b",)) is None


def test_a_session_without_state_is_no_victim() -> None:
    """Evicting it would free nothing, and lose its text."""
    contexts = ledger((b"a", 0, 1.0, False), (b"b", 100, 2.0, True))
    assert contexts.victims(b"c", 1, keep=()) == [b"b"]


def test_only_the_unconnected_grow_idle() -> None:
    contexts = ledger((b"a", 1, 0.0, False), (b"b", 1, 0.0, True), (b"c", 1, 0.5, False))
    assert contexts.idle(9.9) == []
    assert contexts.idle(10.0) == [b"a"]
    assert contexts.idle(10.5) == [b"a", b"c"]


def test_a_device_that_leaves_starts_the_clock_and_keeps_its_state() -> None:
    contexts = ledger((b"a", 30, 0.0, True))
    contexts.detach(b"a", 7.0)
    assert contexts.held_bytes == 30
    assert (contexts.idle(16.9), contexts.idle(17.0)) == ([], [b"a"])


def test_the_stalest_is_the_longest_unused_without_a_device() -> None:
    assert ledger((b"a", 1, 0.0, True)).stalest([b"a"]) is None
    budget = ledger((b"a", 1, 0.0, True), (b"b", 0, 5.0, False), (b"c", 1, 4.0, False))
    assert budget.stalest([b"a", b"b", b"c"]) == b"c"
    assert budget.stalest([b"a", b"b", b"x"]) == b"b"


def test_dropping_twice_is_dropping_once() -> None:
    contexts = ledger((b"a", 30, 0.0, True), (b"b", 5, 0.0, True))
    contexts.drop(b"a")
    contexts.drop(b"a")
    assert (len(contexts), contexts.held_bytes) == (1, 5)


events = st.lists(
    st.tuples(
        st.sampled_from(NAMES),
        st.integers(0, 120),
        st.booleans(),
        st.sets(st.sampled_from(NAMES), max_size=3),
        st.sampled_from(["use", "use", "use", "detach", "drop"]),
    ),
    max_size=40,
)


@given(events)
def test_never_more_is_held_than_the_budget_when_victims_are_dropped_first(
    events: list[tuple[bytes, int, bool, Collection[bytes], str]],
) -> None:
    contexts = KVBudget(100, idle_s=10.0)
    sizes: dict[bytes, int] = {}
    for now_s, (name, size_bytes, attached, keep, event) in enumerate(events):
        if event == "drop":
            contexts.drop(name)
            sizes.pop(name, None)
        elif event == "detach" and name in sizes:
            contexts.detach(name, now_s)
        elif event == "use":
            victims = contexts.victims(name, size_bytes, keep)
            prefill_layers = sum(size for other, size in sizes.items() if other in keep and other != name)
            assert (victims is None) == (prefill_layers + size_bytes > 100)
            if victims is not None:
                assert not {name, *keep} & set(victims)
                for victim in victims:
                    contexts.drop(victim)
                    del sizes[victim]
                contexts.record(name, size_bytes, now_s, attached=attached)
                sizes[name] = size_bytes
        assert contexts.held_bytes == sum(sizes.values()) <= 100
        assert len(contexts) == len(sizes)


@pytest.mark.parametrize("attached", [True, False])
def test_use_makes_recent(attached: bool) -> None:
    contexts = ledger((b"a", 50, 1.0, attached), (b"b", 50, 2.0, attached))
    contexts.record(b"a", 50, 3.0, attached=attached)
    assert contexts.victims(b"c", 50, keep=()) == [b"b"]
