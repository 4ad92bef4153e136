from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from random import Random
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from isthmus.cloud_service.language.kv_budget import KVBudget
from isthmus.cloud_service.language.scheduler import (
    PROTECTED_STEPS,
    Candidate,
    Grant,
    MemoryRequest,
    plan_memory,
    plan_step,
)

STEP = 100  # the number of the step that memory is planned for


def request(name: str, needs_bytes: int = 10, **fields: Any) -> MemoryRequest:
    """A waiting session without a cache; `fields` replace some of it."""
    waiting = MemoryRequest(name.encode(), ord(name), needs_bytes, None, 0, 0, 0, True)
    return replace(waiting, **fields)


def running(name: str, needs_bytes: int = 10, **fields: Any) -> MemoryRequest:
    """A session in the middle of a round, with a cache of the size that it needs."""
    return replace(request(name, needs_bytes), **{"cache_bytes": needs_bytes, "round_steps": 1, **fields})


def ledger(requests: Sequence[MemoryRequest], budget_bytes: int, **others: int) -> KVBudget:
    """What is in memory: the caches of the requests, and others that no device is connected to."""
    budget = KVBudget(budget_bytes, 10.0)
    for each in requests:
        budget.record(each.session, each.cache_bytes or 0, float(each.last_step), attached=True)
    for name, size_bytes in others.items():
        budget.record(name.encode(), size_bytes, 0.0, attached=False)
    return budget


def granted(requests: Sequence[MemoryRequest], budget_bytes: int, **others: int) -> dict[str, str]:
    """The names that get memory, in order, each with the names that are evicted for it."""
    grants = plan_memory(requests, ledger(requests, budget_bytes, **others), STEP)
    return {grant.session.decode(): b"".join(grant.evicted).decode() for grant in grants}


def test_with_room_for_all_nobody_is_evicted() -> None:
    assert granted([request("a"), running("b"), request("c")], 30) == {"b": "", "a": "", "c": ""}


def test_nothing_is_planned_without_requests() -> None:
    assert granted([], 30, x=10) == {}


def test_sessions_without_a_device_are_evicted_first() -> None:
    assert granted([request("a"), running("b", last_step=99)], 30, x=15) == {"b": "", "a": "x"}


def test_a_running_sequence_is_not_preempted_by_one_that_waits() -> None:
    assert granted([request("a", last_step=0), running("b", last_step=99)], 15) == {"b": ""}


def test_waiting_sessions_are_first_come_first_served() -> None:
    requests = [request("a", last_step=7), request("b", last_step=5), request("c", last_step=5)]
    assert granted(requests, 20) == {"b": "", "c": ""}


def test_small_sessions_do_not_overtake_a_large_one_that_waits_longer() -> None:
    requests = [running("a", 10), request("b", 30, last_step=1), request("c", 10, last_step=2)]
    assert granted(requests, 35) == {"a": ""}


def test_a_session_between_rounds_is_protected_for_some_steps_after_its_cache_is_complete() -> None:
    for age, expected in ((PROTECTED_STEPS - 1, {"b": ""}), (PROTECTED_STEPS, {"a": "b"})):
        between = running("b", round_steps=0, first_step=STEP - age, last_step=99)
        assert granted([request("a"), between], 15) == expected
        assert between.is_protected(STEP) == ("b" in expected)


def test_a_session_without_a_cache_is_never_protected() -> None:
    assert not request("a", round_steps=3, first_step=STEP).is_protected(STEP)


def test_the_longest_running_sequence_gets_what_it_needs_from_later_ones() -> None:
    first = replace(running("a", first_step=3), needs_bytes=20)
    later = running("b", first_step=4)
    assert granted([later, first], 25) == {"a": "b"}


def test_running_sequences_that_do_not_fit_do_not_block_smaller_ones() -> None:
    growing = replace(running("b", first_step=4), needs_bytes=30)
    assert granted([running("a", first_step=3), growing, running("c", first_step=5)], 35) == {"a": "", "c": ""}


def test_an_evicted_session_starts_again_if_there_is_room_and_its_round_allows_it() -> None:
    first = replace(running("a", first_step=3, last_step=99), needs_bytes=20)
    later = running("b", first_step=4, last_step=98)
    assert granted([first, later], 30, x=5) == {"a": "x", "b": ""}
    others = {"x": 0}
    tight = [first, replace(later, cache_bytes=15), running("c", round_steps=0, last_step=99)]
    assert granted(tight, 35, **others) == {"a": "b", "b": "c"}
    assert granted([first, replace(tight[1], restartable=False), tight[2]], 35, **others) == {"a": "b", "c": ""}


def test_a_cache_larger_than_its_need_counts_with_its_whole_size() -> None:
    shrunk = replace(running("a"), cache_bytes=30)
    assert granted([shrunk, request("b")], 35) == {"a": ""}


def test_planning_does_not_change_the_budget() -> None:
    requests = [request("a"), running("b")]
    budget = ledger(requests, 20, x=10)
    assert plan_memory(requests, budget, STEP) == [Grant(b"b", ()), Grant(b"a", (b"x",))]
    assert (budget.held_bytes, len(budget)) == (20, 3)


requests_of_some = st.lists(
    st.builds(
        MemoryRequest,
        session=st.sampled_from([bytes([letter]) for letter in b"abcdef"]),
        ticket=st.integers(0, 99),
        needs_bytes=st.integers(1, 40),
        cache_bytes=st.none() | st.integers(1, 15),
        round_steps=st.integers(0, 2),
        first_step=st.integers(50, STEP),
        last_step=st.integers(50, STEP),
        restartable=st.booleans(),
    ),
    max_size=6,
    unique_by=lambda each: each.session,
)


@given(requests_of_some, st.integers(90, 120))
def test_invariants_of_every_memory_plan(requests: list[MemoryRequest], budget_bytes: int) -> None:
    """Carried out in order, it never holds more than the budget, and never evicts what it has granted."""
    budget = ledger(requests, budget_bytes)
    by_name = {each.session: each for each in requests}
    sizes = {each.session: each.cache_bytes or 0 for each in requests}
    grants = plan_memory(requests, budget, STEP)
    assert len({grant.session for grant in grants}) == len(grants)
    evicted: set[bytes] = set()
    for place, grant in enumerate(grants):
        assert not set(grant.evicted) & {each.session for each in grants[: place + 1]}
        evicted |= set(grant.evicted)
        for victim in grant.evicted:
            sizes[victim] = 0
        assert grant.session not in evicted or by_name[grant.session].restartable
        sizes[grant.session] = max(sizes[grant.session], by_name[grant.session].needs_bytes)
        assert sum(sizes.values()) <= budget_bytes
    protected = [each for each in requests if each.is_protected(STEP)]
    if protected:  # each fits alone
        assert grants[0].session == min(protected, key=lambda each: (each.first_step, each.ticket)).session


def test_a_step_without_candidates_is_empty() -> None:
    assert plan_step([], 16) == []
    assert plan_step([Candidate(1, 0, 0)], 16) == []


def test_a_single_prompt_fills_the_step() -> None:
    assert plan_step([Candidate(1, 500, 0)], 16) == [(1, 16)]


def test_a_long_prompt_gets_what_others_leave() -> None:
    candidates = [Candidate(1, 500, 3), Candidate(2, 1, 4), Candidate(3, 5, 4)]
    assert plan_step(candidates, 16) == [(1, 10), (2, 1), (3, 5)]


def test_those_that_wait_longest_come_first() -> None:
    candidates = [Candidate(1, 8, 7), Candidate(2, 8, 5), Candidate(3, 8, 6)]
    assert plan_step(candidates, 16) == [(2, 8), (3, 8)]


def test_a_step_is_of_the_kind_that_waits_longest() -> None:
    candidates = [
        Candidate(1, 8, 7, "full"),
        Candidate(2, 3, 5, "suffix"),
        Candidate(3, 8, 6, "full"),
        Candidate(4, 3, 9, "suffix"),
    ]
    assert plan_step(candidates, 16) == [(2, 3), (4, 3)]
    assert plan_step([candidates[0], candidates[2]], 16) == [(3, 8), (1, 8)]


def test_a_candidate_without_tokens_does_not_decide_the_kind() -> None:
    assert plan_step([Candidate(1, 0, 0, "suffix"), Candidate(2, 3, 5, "full")], 16) == [(2, 3)]


kinds = st.sampled_from(["full", "suffix"])
all_candidates = st.lists(
    st.builds(Candidate, ticket=st.integers(0, 99), tokens=st.integers(0, 40), last_step=st.integers(0, 9), kind=kinds),
    max_size=20,
    unique_by=lambda each: each.ticket,
)


@given(all_candidates, st.integers(1, 20))
def test_invariants_of_every_step(candidates: list[Candidate], width: int) -> None:
    plan = plan_step(candidates, width)
    shares = dict(plan)
    of_kind = {each.kind for each in candidates if each.ticket in shares}
    possible = {each.ticket: each.tokens for each in candidates if each.kind in of_kind}
    assert len(of_kind) == any(each.tokens for each in candidates)
    assert len(shares) == len(plan)
    assert all(0 < tokens <= possible[ticket] for ticket, tokens in plan)
    assert sum(shares.values()) == min(width, sum(possible.values()))  # no row is left empty that somebody candidates


@given(all_candidates, st.integers(1, 20), st.randoms())
def test_a_step_does_not_depend_on_the_order_of_the_candidates(
    candidates: list[Candidate], width: int, random: Random
) -> None:
    shuffled = random.sample(candidates, len(candidates))
    assert plan_step(candidates, width) == plan_step(shuffled, width)


@given(all_candidates, st.integers(2, 20))
def test_every_candidate_gets_a_token_within_one_step_for_every_two(candidates: list[Candidate], width: int) -> None:
    """However long the others' prompts are, and though they each as much again after each pass."""
    waiting = {each.ticket for each in candidates if each.tokens}
    number = 100
    of_kinds = [sum(each.kind == kind and each.tokens > 0 for each in candidates) for kind in ("full", "suffix")]
    for _ in range(sum(-(-count // 2) for count in of_kinds)):
        number += 1
        planned = {ticket for ticket, _ in plan_step(candidates, width)}
        waiting -= planned
        candidates = [replace(each, last_step=number) if each.ticket in planned else each for each in candidates]
    assert not waiting
