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
    RestingCache,
    equal_shares,
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


def test_small_sessions_overtake_a_large_one_that_waits_for_memory_until_it_is_aged() -> None:
    large = request("b", 30, last_step=1)
    requests = [running("a", 10), large, request("c", 10, last_step=2)]
    assert granted(requests, 35) == {"a": "", "c": ""}
    assert granted([requests[0], replace(large, aged=True), requests[2]], 35) == {"a": ""}


def test_an_aged_session_does_not_block_peers_that_hold_less() -> None:
    aged = request("b", 30, last_step=1, aged=True, peer="B")
    own, other = request("d", 5, last_step=2, peer="B"), request("c", 5, last_step=3, peer="C")
    assert granted([running("a", 20, peer="B"), aged, own, other], 45) == {"a": "", "c": ""}
    assert granted([running("a", 20, peer="A"), aged, own, other], 45) == {"a": ""}


def test_the_next_to_get_memory_is_of_the_peer_that_was_granted_least() -> None:
    many = [request(name, last_step=1, peer="many") for name in "abcd"]
    assert list(granted([*many, request("x", last_step=9, peer="one")], 100)) == ["a", "x", "b", "c", "d"]
    assert list(granted([running("e", peer="many"), *many, request("x", 10, last_step=9, peer="one")], 60)) == [
        *"exabcd"
    ]


def test_a_peer_has_two_prompts_at_a_time_and_others_wait_though_there_is_room() -> None:
    prompts = [request(name, last_step=place, prompt=True, peer="many") for place, name in enumerate("abc")]
    decoding, other = request("d", last_step=9, peer="many"), request("x", last_step=9, prompt=True, peer="one")
    assert set(granted([*prompts, decoding, other], 100)) == set("abdx")
    assert set(granted([running("e", prompt=True, peer="many"), *prompts], 100)) == set("ea")
    large = replace(prompts[0], needs_bytes=90)
    assert set(granted([running("e", 20, peer="one"), large, *prompts[1:]], 100)) == set("ebc")


def test_a_peer_beyond_its_share_makes_room_for_one_within_its_own() -> None:
    """Those of its sequences that were granted memory last; what the other leaves, it keeps."""
    many = [running(name, 20, first_step=place, peer="many") for place, name in enumerate("abcde")]
    assert granted([*many, request("x", 20, peer="one")], 100) == {"a": "", "b": "", "x": "e", "c": "", "d": ""}
    assert granted([*many, request("x", 20, peer="many")], 100) == dict.fromkeys("abcde", "")
    assert granted([*many, request("x", 60, peer="one")], 100) == dict.fromkeys("abcde", "")  # beyond its own share


def test_a_session_between_two_rounds_keeps_its_cache_from_a_peer_beyond_its_share() -> None:
    requests = [running("a", 60, peer="many"), request("b", 20, peer="many")]
    budget = ledger([*requests, running("x", 30)], 100)
    resting = [RestingCache(b"x", "one", 30)]
    assert plan_memory(requests, budget, STEP, resting) == [Grant(b"a", ())]
    alone = [RestingCache(b"x", "many", 30)]
    assert plan_memory(requests, budget, STEP, alone) == [Grant(b"a", ()), Grant(b"b", (b"x",))]


def test_a_large_sequence_is_not_starved_by_small_ones_that_keep_coming() -> None:
    """Two small ones of other peers at a time, each for three steps; the large one ages after ten."""
    budget, small = KVBudget(100, 10.0), [running("s", 40, peer="0"), running("t", 40, peer="1")]
    for step in range(40):
        large = request("L", 90, last_step=0, peer="L", aged=step >= 10)
        for place, each in enumerate(small):
            if step % 3 == place and each.cache_bytes is not None:  # its round ends, the next of its peer waits
                budget.drop(each.session)
                small[place] = request(each.session.decode(), 40, last_step=step, ticket=step, peer=each.peer)
        grants = plan_memory([large, *small], budget, step)
        if large.session in {grant.session for grant in grants}:
            break
        assert step < 10 or len(grants) < 2
        names = {grant.session for grant in grants}
        small = [
            running(each.session.decode(), 40, peer=each.peer, first_step=step) if each.session in names else each
            for each in small
        ]
        for each in small:
            budget.record(each.session, each.cache_bytes or 0, step, attached=True)
    assert 10 <= step < 14


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
        peer=st.sampled_from("ABC"),
        aged=st.booleans(),
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


@given(requests_of_some, st.integers(90, 120))
def test_a_peer_without_memory_gets_what_is_within_its_share(requests: list[MemoryRequest], budget_bytes: int) -> None:
    """Whatever the others run or wait for, unless an aged sequence or the first of the running ones needs more."""
    share = budget_bytes // max(len({each.peer for each in requests}), 1)
    requests = [replace(each, aged=False, needs_bytes=min(each.needs_bytes, share)) for each in requests]
    requests = [replace(each, cache_bytes=each.cache_bytes and each.needs_bytes) for each in requests]
    grants = {grant.session for grant in plan_memory(requests, ledger(requests, budget_bytes), STEP)}
    for peer in {each.peer for each in requests}:
        own = [each for each in requests if each.peer == peer]
        if all(each.cache_bytes is None for each in own):
            assert min(own, key=lambda each: (each.last_step, each.ticket)).session in grants


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


def test_peers_have_equal_shares_of_a_step() -> None:
    neighbour = [Candidate(ticket, 1, 0, peer="many") for ticket in range(64)]
    assert dict(plan_step([*neighbour, Candidate(99, 1, 9, peer="one")], 16))[99] == 1
    prompts = [Candidate(ticket, 500, 0, peer="many") for ticket in range(64)]
    assert plan_step([*prompts, Candidate(99, 500, 9, peer="one")], 16) == [(0, 4), (1, 4), (99, 8)]
    assert sum(dict(plan_step([*prompts, Candidate(99, 3, 9, peer="one")], 16)).values()) == 16


def test_the_kind_of_a_step_is_that_of_the_peer_that_was_served_least_recently() -> None:
    """Though its neighbour has sequences of another kind that have waited longer."""
    candidates = [Candidate(ticket, 4, 0, "suffix", "many") for ticket in range(64)]
    candidates.append(Candidate(99, 4, 9, "full", "one"))
    assert plan_step(candidates, 16, {"many": 12, "one": 11}) == [(99, 4)]
    assert 99 not in dict(plan_step(candidates, 16, {"many": 11, "one": 12}))


def test_peers_take_turns_when_they_are_more_than_a_step_has_tokens() -> None:
    candidates = [Candidate(ticket, 9, 0, peer=str(ticket)) for ticket in range(5)]
    served: dict[str, int] = {}
    turns = []
    for step in range(6):
        plan = plan_step(candidates, 2, served)
        turns += [ticket for ticket, _ in plan]
        served |= {str(ticket): step + 1 for ticket, _ in plan}
    assert set(turns[:6]) == set(turns[6:]) == set(range(5))


@given(st.lists(st.integers(0, 30), max_size=20), st.integers(0, 40))
def test_equal_shares_are_equal_except_for_those_that_need_less(demands: list[int], total: int) -> None:
    shares = equal_shares(demands, total)
    assert sum(shares) == min(total, sum(demands))
    assert all(share <= demand for share, demand in zip(shares, demands, strict=True))
    unmet = [share for share, demand in zip(shares, demands, strict=True) if share < demand]
    assert not unmet or max(shares) <= min(unmet) + 1


def test_a_candidate_without_tokens_does_not_decide_the_kind() -> None:
    assert plan_step([Candidate(1, 0, 0, "suffix"), Candidate(2, 3, 5, "full")], 16) == [(2, 3)]


kinds = st.sampled_from(["full", "suffix"])
a_candidate = st.builds(
    Candidate, ticket=st.integers(0, 99), tokens=st.integers(0, 40), last_step=st.integers(0, 9), kind=kinds
)
of_a_peer = st.builds(replace, a_candidate, peer=st.sampled_from("ABC"))
all_candidates = st.lists(
    a_candidate,
    max_size=20,
    unique_by=lambda each: each.ticket,
)

candidates_of_peers = st.lists(of_a_peer, max_size=20, unique_by=lambda each: each.ticket)


@given(candidates_of_peers, st.integers(1, 20))
def test_invariants_of_every_step(candidates: list[Candidate], width: int) -> None:
    plan = plan_step(candidates, width)
    shares = dict(plan)
    of_kind = {each.kind for each in candidates if each.ticket in shares}
    possible = {each.ticket: each.tokens for each in candidates if each.kind in of_kind}
    assert len(of_kind) == any(each.tokens for each in candidates)
    assert len(shares) == len(plan)
    assert all(0 < tokens <= possible[ticket] for ticket, tokens in plan)
    assert sum(shares.values()) == min(width, sum(possible.values()))  # no row is left empty that somebody candidates


@given(candidates_of_peers, st.integers(1, 20), st.randoms())
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
