from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.cloud_service.vision.batching import BatchLimits, QueuedInput, next_batch

A, B = (b"bundle a", 1), (b"bundle b", 1)
LIMITS = BatchLimits(max_size=3, max_wait_s=0.010)


def queued(ticket: int, key: tuple[bytes, int] = A, arrived_s: float = 0.0, deadline_s: float = 1.0) -> QueuedInput:
    return QueuedInput(ticket, key, arrived_s, deadline_s)


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
