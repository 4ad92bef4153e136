"""Which queued inputs are computed next. Pure: takes the queue and the time, returns a plan.

Knows nothing about payloads, networks or gRPC.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from isthmus.models.settings import Flag


@dataclass(frozen=True, slots=True)
class QueuedInput:
    """A queued input. Only inputs of equal `key` can share a batch. Times are monotonic seconds."""

    ticket: int
    key: Hashable
    arrived_s: float
    deadline_s: float


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """A batch starts when it has `max_size` inputs or its oldest has waited `max_wait_s`."""

    max_size: Annotated[int, Field(ge=1, le=1024, description="Photos in a batch, at most."), Flag("max_batch")] = 16
    max_wait_s: Annotated[
        float, Field(ge=0, le=1, description="Milliseconds that a batch may wait to fill."), Flag("max_wait_ms", 1000)
    ] = 0.002  # a tenth of one tail on one core: what a fuller batch may cost its first input


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """`expired` is refused, `batch` is computed now; without a batch, plan again in `wait_s` (None: on an arrival)."""

    batch: tuple[QueuedInput, ...]
    expired: tuple[QueuedInput, ...]
    wait_s: float | None


def next_batch(queue: Sequence[QueuedInput], now_s: float, limits: BatchLimits) -> BatchPlan:
    """Plan the next batch of a queue in order of arrival.

    A full batch goes first; otherwise the group of the oldest input, once that has waited `max_wait_s`.
    """
    expired = tuple(queued for queued in queue if queued.deadline_s <= now_s)
    groups: dict[Hashable, list[QueuedInput]] = {}
    for queued in queue:
        if queued.deadline_s > now_s:
            groups.setdefault(queued.key, []).append(queued)
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
