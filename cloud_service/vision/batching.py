"""Which waiting inputs are computed next. Pure: the time comes in, a plan goes out, nothing is done here.

Knows nothing about payloads, networks or gRPC.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class QueuedInput:
    """One waiting input. Only inputs of equal `key` can share a batch. Times are monotonic seconds."""

    ticket: int
    key: Hashable
    arrived_s: float
    deadline_s: float


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """A batch starts when it has `max_size` inputs or its oldest has waited `max_wait_s`."""

    max_size: int = 16
    max_wait_s: float = 0.002  # a tenth of one tail on one core: what a fuller batch may cost the first in it


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """`expired` is to be refused, `batch` computed now; without a batch, look again in `wait_s` (None: at arrival)."""

    batch: tuple[QueuedInput, ...]
    expired: tuple[QueuedInput, ...]
    wait_s: float | None


def next_batch(queue: Sequence[QueuedInput], now_s: float, limits: BatchLimits) -> BatchPlan:
    """Plan the next batch of a queue in order of arrival.

    A full batch goes first; otherwise the key of the longest-waiting input, once that has waited enough.
    """
    expired = tuple(work for work in queue if work.deadline_s <= now_s)
    groups: dict[Hashable, list[QueuedInput]] = {}
    for work in queue:
        if work.deadline_s > now_s:
            groups.setdefault(work.key, []).append(work)
    if not groups:
        return BatchPlan((), expired, None)
    full = (group for group in groups.values() if len(group) >= limits.max_size)
    oldest = next(iter(groups.values()))
    chosen = next(full, None)
    if chosen is None:
        left_s = oldest[0].arrived_s + limits.max_wait_s - now_s
        if left_s > 0:
            return BatchPlan((), expired, left_s)
        chosen = oldest
    return BatchPlan(tuple(chosen[: limits.max_size]), expired, None)


@dataclass(frozen=True, slots=True)
class Candidate:
    """Rows that one session could have in the next pass, and the number of the pass that last served it.

    Only wants of equal `kind` can share a pass.
    """

    ticket: int
    rows: int
    served: int
    kind: Hashable = None


def next_pass(wants: Sequence[Candidate], width: int) -> list[tuple[int, int]]:
    """(ticket, rows) of the next pass of `width` rows, at most.

    The least recently served come first, each with half a pass at most; what is left then goes to them in the same
    order. So a long prompt fills what others leave, and holds nobody up. The first of all says which kind is next.
    """
    order = sorted((want for want in wants if want.rows), key=lambda want: (want.served, want.ticket))
    order = [want for want in order if want.kind == order[0].kind]
    given: dict[int, int] = {}
    left = width
    for share in (max(width // 2, 1), width):
        for want in order:
            had = given.get(want.ticket, 0)
            rows = min(max(min(want.rows, share) - had, 0), left)
            if rows:
                given[want.ticket] = had + rows
                left -= rows
    return list(given.items())
