from __future__ import annotations

from collections import Counter
from collections.abc import Hashable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.cloud_service.vision.batching import (
    LONGEST_BATCH_S,
    BatchLimits,
    QueuedInput,
    least_entitled,
    most_wait_s,
    next_batch,
    wait_s,
)

A, B = (b"bundle a", 1), (b"bundle b", 1)
LIMITS = BatchLimits(max_size=3, max_wait_s=0.010)


def queued(
    ticket: int, key: tuple[bytes, int] = A, arrived_s: float = 0.0, deadline_s: float = 1.0, peer: str = ""
) -> QueuedInput:
    return QueuedInput(ticket, key, arrived_s, deadline_s, peer)


def tenths(key: Hashable, size: int) -> float:
    """A batch takes 10 ms for each of its inputs."""
    return 0.010 * size


def tickets(plan_inputs: tuple[QueuedInput, ...]) -> list[int]:
    return [item.ticket for item in plan_inputs]


def test_an_empty_queue_waits_for_an_arrival() -> None:
    plan = next_batch([], 0.0, LIMITS)
    assert (plan.batch, plan.expired, plan.wait_s) == ((), (), None)


def test_a_single_input_waits_for_others_then_goes_alone() -> None:
    alone = queued(1, arrived_s=5.0, deadline_s=9.0)
    early = next_batch([alone], 5.004, LIMITS)
    assert early.batch == ()
    assert early.wait_s == pytest.approx(0.006)
    assert next_batch([alone], 5.010, LIMITS).batch == (alone,)


def test_a_full_batch_does_not_wait() -> None:
    queue = [queued(1), queued(2), queued(3), queued(4)]
    assert next_batch(queue, 0.0, LIMITS).batch == tuple(queue[:3])


def test_a_full_batch_goes_before_an_older_single_input() -> None:
    queue = [queued(1, B), queued(2), queued(3), queued(4)]
    assert next_batch(queue, 0.001, LIMITS).batch == tuple(queue[1:])


def test_bundles_do_not_mix() -> None:
    queue = [queued(1, A), queued(2, B), queued(3, A)]
    assert next_batch(queue, 0.5, LIMITS).batch == (queue[0], queue[2])


def test_whole_images_and_latents_of_one_bundle_do_not_mix() -> None:
    queue = [queued(1, (b"bundle a", 1)), queued(2, (b"bundle a", 2))]
    assert next_batch(queue, 0.5, LIMITS).batch == (queue[0],)


def test_expired_inputs_are_refused_not_computed() -> None:
    late, good = queued(1, deadline_s=0.2), queued(2)
    plan = next_batch([late, good], 0.2, LIMITS)
    assert plan.expired == (late,)
    assert plan.batch == (good,)


def test_what_cannot_be_computed_in_time_is_refused_before_it_is() -> None:
    queue = [queued(1, deadline_s=0.509), queued(2, deadline_s=0.6)]
    plan = next_batch(queue, 0.5, LIMITS, tenths)
    assert (tickets(plan.expired), tickets(plan.batch)) == ([1], [2])


def test_when_nothing_seems_to_be_in_time_one_input_is_tried() -> None:
    """The prediction may be wrong, and without a batch nothing new is measured."""
    queue = [queued(1, deadline_s=0.504), queued(2, deadline_s=0.506), queued(3, deadline_s=0.505)]
    plan = next_batch(queue, 0.5, LIMITS, tenths)
    assert (tickets(plan.expired), tickets(plan.batch)) == ([1, 3], [2])


def test_a_batch_is_no_larger_than_all_of_it_can_wait() -> None:
    queue = [queued(1, deadline_s=0.525), *(queued(ticket) for ticket in range(2, 6))]
    assert tickets(next_batch(queue, 0.5, BatchLimits(8), tenths).batch) == [1, 2]


def test_a_batch_of_several_takes_a_tenth_of_a_second_at_most() -> None:
    queue = [queued(ticket, deadline_s=9.0) for ticket in range(16)]
    assert len(next_batch(queue, 0.5, BatchLimits(16), tenths).batch) == LONGEST_BATCH_S / 0.010
    assert len(next_batch(queue, 0.5, BatchLimits(16), lambda key, size: size * 1.0).batch) == 1


def test_an_input_with_little_time_left_does_not_make_a_batch_small_when_others_are_first() -> None:
    queue = [
        queued(1, deadline_s=0.525, peer="a"),
        *(queued(ticket, peer=peer) for ticket, peer in enumerate("bcb", 2)),
    ]
    plan = next_batch(queue, 0.5, BatchLimits(8), tenths, {"a": 1})
    assert (tickets(plan.batch), plan.expired) == ([2, 3, 4], ())


def test_the_newest_go_first_when_the_queue_is_too_long() -> None:
    short = [queued(ticket, deadline_s=0.55 + 0.01 * ticket) for ticket in range(6)]
    assert tickets(next_batch(short, 0.5, LIMITS, tenths).batch) == [0, 1, 2]
    long = [queued(ticket, deadline_s=0.52 + 0.002 * ticket) for ticket in range(6)]
    assert tickets(next_batch(long, 0.5, LIMITS, tenths).batch) == [4, 5]


def test_a_peer_in_a_hurry_changes_no_other_s_order() -> None:
    hurried = [queued(ticket, deadline_s=0.52, peer="hurried") for ticket in (1, 2, 3)]
    patient = [queued(ticket, peer="patient") for ticket in (4, 5, 6)]
    assert tickets(next_batch([*hurried, *patient], 0.5, BatchLimits(2), tenths).batch) == [3, 4]


def test_peers_take_turns_within_a_batch() -> None:
    queue = [*(queued(ticket, peer="greedy") for ticket in range(9)), queued(9, peer="a"), queued(10, peer="b")]
    assert tickets(next_batch(queue, 0.5, LIMITS).batch) == [0, 9, 10]
    assert tickets(next_batch(queue[:10], 0.5, LIMITS).batch) == [0, 1, 9]


def test_who_was_served_longest_ago_is_first() -> None:
    queue = [queued(ticket, peer=peer) for ticket, peer in enumerate("abcdd")]
    assert tickets(next_batch(queue, 0.5, LIMITS, served={"a": 7, "b": 5, "c": 6}).batch) == [1, 2, 3]


def test_full_batches_of_one_peer_do_not_keep_another_s_kind_waiting() -> None:
    queue = [*(queued(ticket, A, peer="greedy") for ticket in range(9)), queued(9, B, peer="other")]
    assert tickets(next_batch(queue, 0.5, LIMITS, served={"greedy": 1}).batch) == [9]


def test_an_input_waits_for_those_whose_turn_comes_before_it() -> None:
    queue = [*(queued(ticket, peer="greedy") for ticket in range(9)), queued(9, peer="a")]
    waits = [wait_s(queue, peer, LIMITS, tenths) for peer in ("new", "a", "greedy")]
    assert waits == pytest.approx([0.02, 0.03, 0.10])
    assert wait_s([], "new", LIMITS, tenths) == 0.0


def test_an_input_without_wait_is_never_too_late_to_be_tried() -> None:
    assert [most_wait_s(budget_s, A, tenths) for budget_s in (0.005, 0.11)] == pytest.approx([0.0, 0.05])


def test_a_full_queue_loses_an_input_of_the_peer_with_the_most() -> None:
    queue = [
        *(queued(ticket, deadline_s=1.0 - 0.1 * ticket, peer="greedy") for ticket in range(3)),
        queued(9, peer="a"),
    ]
    lost = least_entitled(queue, queued(10, peer="a"), by_bytes=False)
    assert lost == queue[2]
    assert least_entitled(queue, queued(10, peer="greedy"), by_bytes=False) is None
    assert least_entitled(queue[1:], queued(10, peer="a"), by_bytes=False) is None


def test_a_queue_full_of_bytes_loses_an_input_of_the_peer_with_the_most_bytes() -> None:
    queue = [QueuedInput(1, A, 0.0, 1.0, "large", 900), *(QueuedInput(t, A, 0.0, 1.0, "many", 9) for t in (2, 3, 4))]
    assert least_entitled(queue, QueuedInput(5, A, 0.0, 1.0, "new", 9), by_bytes=True) == queue[0]
    assert least_entitled(queue, QueuedInput(5, A, 0.0, 1.0, "new", 900), by_bytes=True) is None


queues = st.lists(
    st.builds(
        QueuedInput,
        ticket=st.integers(),
        key=st.sampled_from([A, B, (b"bundle a", 2)]),
        arrived_s=st.floats(0, 1),
        deadline_s=st.floats(0, 2),
        peer=st.sampled_from(["a", "b", "c"]),
    ),
    max_size=30,
    unique_by=lambda item: item.ticket,
).map(lambda items: sorted(items, key=lambda item: item.arrived_s))


@given(queues, st.floats(0, 2), st.integers(1, 8))
def test_invariants_of_every_plan(queue: list[QueuedInput], now_s: float, max_size: int) -> None:
    limits = BatchLimits(max_size, 0.010)
    plan = next_batch(queue, now_s, limits)
    assert len({item.key for item in plan.batch}) <= 1
    assert len(plan.batch) <= max_size
    assert list(plan.batch) == [item for item in queue if item in plan.batch]
    assert all(item.deadline_s > now_s for item in plan.batch)
    assert list(plan.expired) == [item for item in queue if item.deadline_s <= now_s]
    assert plan.wait_s is None or (plan.wait_s > 0 and not plan.batch)


@given(queues, st.integers(1, 8))
def test_no_input_starves(queue: list[QueuedInput], max_size: int) -> None:
    """Once every wait is over, plan after plan empties the queue, and each input is dealt with exactly once."""
    now_s, seen = 1.5, []
    while queue:
        plan = next_batch(queue, now_s, BatchLimits(max_size, 0.010))
        gone = {*plan.batch, *plan.expired}
        assert gone
        seen += [item.ticket for item in gone]
        queue = [item for item in queue if item not in gone]
    assert len(seen) == len(set(seen))


@given(
    queues,
    st.floats(0, 2),
    st.integers(1, 8),
    st.floats(0, 0.5),
    st.dictionaries(st.sampled_from("abc"), st.integers()),
)
def test_invariants_of_every_plan_with_a_prediction(
    queue: list[QueuedInput], now_s: float, max_size: int, each_s: float, served: dict[str, int]
) -> None:
    plan = next_batch(queue, now_s, BatchLimits(max_size, 0.010), lambda key, size: each_s * size, served)
    done_s = now_s + each_s * len(plan.batch)
    refused = {item.ticket for item in plan.expired}
    assert not refused & {item.ticket for item in plan.batch}
    assert len(plan.batch) <= max_size
    if len(plan.batch) > 1:  # a single one may be a trial
        assert all(done_s <= item.deadline_s for item in plan.batch)
        assert done_s - now_s <= LONGEST_BATCH_S
    for item in queue:  # what can be computed in time is never refused, what has expired always is
        if item.deadline_s <= now_s:
            assert item.ticket in refused
        elif now_s + each_s <= item.deadline_s:
            assert item.ticket not in refused


@given(queues, st.integers(1, 8))
def test_no_peer_gets_two_more_than_another_that_waits(queue: list[QueuedInput], max_size: int) -> None:
    queue = [QueuedInput(item.ticket, A, item.arrived_s, 9.0, item.peer) for item in queue]
    batch = next_batch(queue, 2.0, BatchLimits(max_size)).batch
    left, taken = Counter(item.peer for item in queue), Counter(item.peer for item in batch)
    for peer in left:
        if left[peer] > taken[peer]:
            assert max(taken.values()) <= taken[peer] + 1
