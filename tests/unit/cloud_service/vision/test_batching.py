from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.cloud_service.vision.batching import BatchLimits, Candidate, QueuedInput, next_batch, next_pass

A, B = (b"bundle a", 1), (b"bundle b", 1)
LIMITS = BatchLimits(max_size=3, max_wait_s=0.010)


def work(ticket: int, key: tuple[bytes, int] = A, arrived_s: float = 0.0, deadline_s: float = 1.0) -> QueuedInput:
    return QueuedInput(ticket, key, arrived_s, deadline_s)


def test_an_empty_queue_waits_for_an_arrival() -> None:
    plan = next_batch([], 0.0, LIMITS)
    assert (plan.batch, plan.expired, plan.wait_s) == ((), (), None)


def test_a_lonely_input_waits_for_company_then_goes_alone() -> None:
    alone = work(1, arrived_s=5.0, deadline_s=9.0)
    early = next_batch([alone], 5.004, LIMITS)
    assert early.batch == ()
    assert early.wait_s == pytest.approx(0.006)
    assert next_batch([alone], 5.010, LIMITS).batch == (alone,)


def test_a_full_batch_does_not_wait() -> None:
    queue = [work(1), work(2), work(3), work(4)]
    assert next_batch(queue, 0.0, LIMITS).batch == tuple(queue[:3])


def test_a_full_batch_goes_before_an_older_lonely_one() -> None:
    queue = [work(1, B), work(2), work(3), work(4)]
    assert next_batch(queue, 0.001, LIMITS).batch == tuple(queue[1:])


def test_bundles_do_not_mix() -> None:
    queue = [work(1, A), work(2, B), work(3, A)]
    assert next_batch(queue, 0.5, LIMITS).batch == (queue[0], queue[2])


def test_whole_images_and_latents_of_one_bundle_do_not_mix() -> None:
    queue = [work(1, (b"bundle a", 1)), work(2, (b"bundle a", 2))]
    assert next_batch(queue, 0.5, LIMITS).batch == (queue[0],)


def test_expired_work_is_refused_not_computed() -> None:
    late, good = work(1, deadline_s=0.2), work(2)
    plan = next_batch([late, good], 0.2, LIMITS)
    assert plan.expired == (late,)
    assert plan.batch == (good,)


queues = st.lists(
    st.builds(
        QueuedInput,
        ticket=st.integers(),
        key=st.sampled_from([A, B, (b"bundle a", 2)]),
        arrived_s=st.floats(0, 1),
        deadline_s=st.floats(0, 2),
    ),
    max_size=30,
    unique_by=lambda item: item.ticket,
).map(lambda items: sorted(items, key=lambda item: item.arrived_s))


@given(queues, st.floats(0, 2), st.integers(1, 8))
def test_what_every_plan_keeps(queue: list[QueuedInput], now_s: float, max_size: int) -> None:
    limits = BatchLimits(max_size, 0.010)
    plan = next_batch(queue, now_s, limits)
    assert len({item.key for item in plan.batch}) <= 1
    assert len(plan.batch) <= max_size
    assert list(plan.batch) == [item for item in queue if item in plan.batch]
    assert all(item.deadline_s > now_s for item in plan.batch)
    assert list(plan.expired) == [item for item in queue if item.deadline_s <= now_s]
    assert plan.wait_s is None or (plan.wait_s > 0 and not plan.batch)


@given(queues, st.integers(1, 8))
def test_nobody_starves(queue: list[QueuedInput], max_size: int) -> None:
    """Once every wait is over, plan after plan empties the queue, and each input is dealt with exactly once."""
    now_s, seen = 1.5, []
    while queue:
        plan = next_batch(queue, now_s, BatchLimits(max_size, 0.010))
        gone = {*plan.batch, *plan.expired}
        assert gone
        seen += [item.ticket for item in gone]
        queue = [item for item in queue if item not in gone]
    assert len(seen) == len(set(seen))


def test_a_pass_without_wants_is_empty() -> None:
    assert next_pass([], 16) == []
    assert next_pass([Candidate(1, 0, 0)], 16) == []


def test_a_lonely_prompt_fills_the_pass() -> None:
    assert next_pass([Candidate(1, 500, 0)], 16) == [(1, 16)]


def test_a_long_prompt_takes_what_others_leave() -> None:
    wants = [Candidate(1, 500, 3), Candidate(2, 1, 4), Candidate(3, 5, 4)]
    assert next_pass(wants, 16) == [(1, 10), (2, 1), (3, 5)]


def test_the_least_recently_served_come_first() -> None:
    wants = [Candidate(1, 8, 7), Candidate(2, 8, 5), Candidate(3, 8, 6)]
    assert next_pass(wants, 16) == [(2, 8), (3, 8)]


def test_a_pass_is_of_the_kind_that_waits_longest() -> None:
    wants = [
        Candidate(1, 8, 7, "whole"),
        Candidate(2, 3, 5, "behind"),
        Candidate(3, 8, 6, "whole"),
        Candidate(4, 3, 9, "behind"),
    ]
    assert next_pass(wants, 16) == [(2, 3), (4, 3)]
    assert next_pass([wants[0], wants[2]], 16) == [(3, 8), (1, 8)]


def test_one_who_wants_nothing_does_not_choose_the_kind() -> None:
    assert next_pass([Candidate(1, 0, 0, "behind"), Candidate(2, 3, 5, "whole")], 16) == [(2, 3)]


kinds = st.sampled_from(["whole", "behind"])
all_wants = st.lists(
    st.builds(Candidate, ticket=st.integers(0, 99), rows=st.integers(0, 40), served=st.integers(0, 9), kind=kinds),
    max_size=20,
    unique_by=lambda want: want.ticket,
)


@given(all_wants, st.integers(1, 20))
def test_what_every_pass_keeps(wants: list[Candidate], width: int) -> None:
    plan = next_pass(wants, width)
    given_rows = dict(plan)
    of_kind = {want.kind for want in wants if want.ticket in given_rows}
    wanted = {want.ticket: want.rows for want in wants if want.kind in of_kind}
    assert len(of_kind) == any(want.rows for want in wants)
    assert len(given_rows) == len(plan)
    assert all(0 < rows <= wanted[ticket] for ticket, rows in plan)
    assert sum(given_rows.values()) == min(width, sum(wanted.values()))  # no row is left empty that somebody wants


@given(all_wants, st.integers(1, 20), st.randoms())
def test_a_pass_does_not_depend_on_the_order_of_the_wants(wants: list[Candidate], width: int, random: Random) -> None:
    shuffled = random.sample(wants, len(wants))
    assert next_pass(wants, width) == next_pass(shuffled, width)


@given(all_wants, st.integers(2, 20))
def test_everyone_who_waits_is_served_within_a_pass_for_every_two(wants: list[Candidate], width: int) -> None:
    """However long the others' prompts are, and though they want as much again after each pass."""
    waiting = {want.ticket for want in wants if want.rows}
    number = 100
    of_kinds = [sum(want.kind == kind and want.rows > 0 for want in wants) for kind in ("whole", "behind")]
    for _ in range(sum(-(-count // 2) for count in of_kinds)):
        number += 1
        served = {ticket for ticket, _ in next_pass(wants, width)}
        waiting -= served
        wants = [replace(want, served=number) if want.ticket in served else want for want in wants]
    assert not waiting
