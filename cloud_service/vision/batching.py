"""Which queued inputs are computed next, and which are refused. Pure: takes the queue and the time, returns a plan.

Peers take turns, so that one with many inputs delays the others little. Inputs of a peer are computed in order of
arrival while all of them can be computed in time, else the newest first: they have the most time left.

Knows nothing about payloads, networks or gRPC.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Annotated

from pydantic import Field

from isthmus.models.settings import Flag

WAIT_SHARE = 0.5  # of an input's time that it may wait for a batch by the prediction; the rest is for what that misses

LONGEST_BATCH_S = 0.1  # of several inputs: every arrival waits for it, and slow networks gain little from batches
MAX_PEERS = 4096  # whose turns are remembered; one that was forgotten is served next

PEER, KEY = attrgetter("peer"), attrgetter("key")

Predict = Callable[[Hashable, int], float]  # seconds that a batch of this key and size takes


@dataclass(frozen=True, slots=True)
class QueuedInput:
    """A queued input. Only inputs of equal `key` can share a batch. Times are monotonic seconds."""

    ticket: int
    key: Hashable
    arrived_s: float
    deadline_s: float
    peer: str = ""
    payload_bytes: int = 0


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


def at_once(key: Hashable, size: int) -> float:
    """The prediction before anything was measured: no time."""
    return 0.0


def next_batch(
    queue: Sequence[QueuedInput],
    now_s: float,
    limits: BatchLimits,
    predict: Predict = at_once,
    served: Mapping[str, int] = {},
) -> BatchPlan:
    """Plan the next batch of a queue in order of arrival. `served`: the numbers that `note_turns` gave to peers.

    Inputs that cannot be computed in time are refused; if that is true of all, the one with the most time left is
    computed alone, because the prediction may be wrong. Whose turn it is decides between the groups of equal key that
    are full or whose oldest input has waited `max_wait_s`.
    """
    timely = in_time(queue, now_s, predict)
    tickets = {queued.ticket for queued in timely}
    expired = tuple(queued for queued in queue if queued.ticket not in tickets)
    if not timely:
        return BatchPlan((), expired, None)
    groups: dict[Hashable, list[QueuedInput]] = {}
    for queued in timely:
        groups.setdefault(queued.key, []).append(queued)
    waits = {key: group[0].arrived_s + limits.max_wait_s - now_s for key, group in groups.items()}
    ready = {key for key, group in groups.items() if waits[key] <= 0 or len(group) >= limits.max_size}
    if not ready:
        return BatchPlan((), expired, min(waits.values()))
    ordered = in_order(timely, now_s, limits, predict, served)
    key = next(queued.key for queued in ordered if queued.key in ready)
    batch = fill((queued for queued in ordered if queued.key == key), now_s, limits.max_size, predict)
    return BatchPlan(tuple(queued for queued in timely if queued.ticket in batch), expired, None)


def in_time(queue: Sequence[QueuedInput], now_s: float, predict: Predict) -> list[QueuedInput]:
    """The inputs that can be computed in time; if there is none, the one with the most time left."""
    alive = [queued for queued in queue if queued.deadline_s > now_s]
    done_s = {key: now_s + predict(key, 1) for key in set(map(KEY, alive))}
    timely = [queued for queued in alive if done_s[queued.key] <= queued.deadline_s]
    return timely or sorted(alive, key=lambda queued: -queued.deadline_s)[:1]


def in_order(
    queue: Sequence[QueuedInput], now_s: float, limits: BatchLimits, predict: Predict, served: Mapping[str, int]
) -> list[QueuedInput]:
    """The queue in order of computation."""
    ordered, crowded = in_turn(queue, served), set()
    alone_s = {key: predict(key, 1) for key in set(map(KEY, queue))}
    each_s = {key: predict(key, limits.max_size) / limits.max_size for key in alone_s}
    for queued in ordered:
        if now_s + alone_s[queued.key] > queued.deadline_s:
            crowded.add(queued.peer)
        now_s += each_s[queued.key]
    return in_turn(queue, served, crowded) if crowded else ordered


def in_turn(
    queue: Sequence[QueuedInput], served: Mapping[str, int], newest_first: Collection[str] = ()
) -> list[QueuedInput]:
    """One input of each peer, the longest not served first, then a second one of each, and so on."""
    lines: dict[str, list[QueuedInput]] = {}
    for queued in queue:
        lines.setdefault(queued.peer, []).append(queued)
    ranked: list[tuple[int, int, float, int, QueuedInput]] = []
    for peer, line in lines.items():
        number = served.get(peer, -1)
        for rank, queued in enumerate(reversed(line) if peer in newest_first else line):
            ranked.append((rank, number, queued.arrived_s, len(ranked), queued))
    return [queued for *_, queued in sorted(ranked)]


def note_turns(served: dict[str, int], batch: Iterable[QueuedInput]) -> None:
    """Number the peers of a batch anew, in `served`, so that all others come first; who had most in it comes last."""
    number = next(reversed(served.values()), 0)
    counts = Counter(queued.peer for queued in batch)
    for peer in sorted(counts, key=lambda peer: counts[peer]):
        number += 1
        served.pop(peer, None)
        served[peer] = number
    while len(served) > MAX_PEERS:
        del served[next(iter(served))]


def fill(ordered: Iterable[QueuedInput], now_s: float, max_size: int, predict: Predict) -> set[int]:
    """Tickets of a batch of the first inputs, at least one; as many as keep it short and all of them in time."""
    batch: set[int] = set()
    latest_s = now_s + LONGEST_BATCH_S
    for queued in ordered:
        done_s = now_s + predict(queued.key, len(batch) + 1)
        if batch and (len(batch) == max_size or done_s > latest_s):
            break
        if batch and done_s > queued.deadline_s:
            continue  # too late in a batch of this size
        batch.add(queued.ticket)
        latest_s = min(latest_s, queued.deadline_s)
    return batch


def wait_s(queue: Sequence[QueuedInput], peer: str, limits: BatchLimits, predict: Predict) -> float:
    """Predicted seconds of the batches before that of a new input of `peer`, by its turn."""
    waiting = Counter(map(PEER, queue))
    ahead = sum(min(count, waiting[peer] + 1) for count in waiting.values())
    each_s = [
        count * predict(key, limits.max_size) / limits.max_size for key, count in Counter(map(KEY, queue)).items()
    ]
    return ahead * sum(each_s) / max(len(queue), 1)


def most_wait_s(budget_s: float, key: Hashable, predict: Predict) -> float:
    """How long an input may wait for its batch, by the prediction, to be accepted; no input is too late for no wait."""
    return max(WAIT_SHARE * (budget_s - predict(key, 1)), 0.0)


def least_entitled(queue: Sequence[QueuedInput], new: QueuedInput, *, by_bytes: bool) -> QueuedInput | None:
    """The input that leaves a full queue for a new one; None when the new one is refused.

    Of the peer with the most inputs or bytes waiting, the one with the least time left.
    """
    waiting: Counter[str] = Counter()
    for queued in (new, *queue):
        waiting[queued.peer] += queued.payload_bytes if by_bytes else 1
    largest = max(waiting, key=lambda peer: waiting[peer])
    if largest == new.peer:
        return None
    return min((queued for queued in queue if queued.peer == largest), key=lambda queued: queued.deadline_s)
