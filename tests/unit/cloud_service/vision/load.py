"""A service under load in virtual time: the real planning, arrivals and computations from a seeded generator."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from isthmus.cloud_service.vision.batching import (
    BatchLimits,
    QueuedInput,
    least_entitled,
    most_wait_s,
    next_batch,
    note_turns,
    wait_s,
)
from isthmus.cloud_service.vision.compute_time import ComputeTimes

QUEUE_LIMIT = 256


@dataclass
class Outcome:
    """What became of a peer's inputs. `latency_s` of those answered in time."""

    latency_s: list[float] = field(default_factory=list)
    late: int = 0
    refused: int = 0  # at submission
    dropped: int = 0  # from the queue

    def quantile_s(self, share: float) -> float:
        return sorted(self.latency_s)[int(share * len(self.latency_s))]


class Load:
    """One compute thread on which a batch of n takes `fixed_s` + n x `each_s`, times 0.8 to 1.2."""

    def __init__(self, fixed_s: float, each_s: float, budget_s: float) -> None:
        self.fixed_s, self.each_s, self.budget_s = fixed_s, each_s, budget_s
        self.outcomes: dict[str, Outcome] = {}
        self.times, self.limits = ComputeTimes(), BatchLimits()
        self._queue: list[QueuedInput] = []
        self._served: dict[str, int] = {}
        self._until_s = 0.0  # by the prediction
        self._rng = random.Random(7)

    def run(self, arrivals: Sequence[tuple[float, str]]) -> None:
        """`arrivals`: (seconds, peer) in order of time."""
        waiting, now_s = list(reversed(arrivals)), 0.0
        while waiting or self._queue:
            plan = next_batch(self._queue, now_s, self.limits, self.times.predict, self._served)
            gone = {queued.ticket for queued in (*plan.batch, *plan.expired)}
            self._queue = [queued for queued in self._queue if queued.ticket not in gone]
            for queued in plan.expired:
                self.of(queued.peer).dropped += 1
            if plan.batch:
                note_turns(self._served, plan.batch)
                ended_s = now_s + (self.fixed_s + self.each_s * len(plan.batch)) * self._rng.uniform(0.8, 1.2)
                self._until_s = now_s + self.times.predict("k", len(plan.batch))
                self._admit(waiting, ended_s)
                self.times.observe("k", len(plan.batch), ended_s - now_s)
                self._finish(plan.batch, ended_s)
                now_s, self._until_s = ended_s, 0.0
            else:
                due_s = [now_s + plan.wait_s] if plan.wait_s is not None else []
                now_s = min([*due_s, *(at_s for at_s, _ in waiting[-1:])], default=now_s)
                self._admit(waiting, now_s)

    def of(self, peer: str) -> Outcome:
        return self.outcomes.setdefault(peer, Outcome())

    def _finish(self, batch: Sequence[QueuedInput], ended_s: float) -> None:
        for queued in batch:
            if queued.deadline_s < ended_s:
                self.of(queued.peer).late += 1
            else:
                self.of(queued.peer).latency_s.append(ended_s - queued.arrived_s)

    def _admit(self, waiting: list[tuple[float, str]], until_s: float) -> None:
        while waiting and waiting[-1][0] <= until_s:
            at_s, peer = waiting.pop()
            new = QueuedInput(len(waiting), "k", at_s, at_s + self.budget_s, peer)
            busy_s = max(self._until_s - at_s, 0.0)
            waits_s = busy_s + wait_s(self._queue, peer, self.limits, self.times.predict)
            if waits_s > most_wait_s(self.budget_s, "k", self.times.predict):
                self.of(peer).refused += 1
                continue
            if len(self._queue) >= QUEUE_LIMIT:
                loser = least_entitled(self._queue, new, by_bytes=False) or new
                self.of(loser.peer).refused += 1
                self._queue = [queued for queued in self._queue if queued is not loser]
                if loser is new:
                    continue
            self._queue.append(new)


def poisson(rate: float, seconds: float, peers: Sequence[str], seed: int) -> list[tuple[float, str]]:
    """Arrivals at random times, `rate` a second in all, each of a random peer."""
    rng, at_s, arrivals = random.Random(seed), 0.0, []
    while (at_s := at_s + rng.expovariate(rate)) < seconds:
        arrivals.append((at_s, rng.choice(peers)))
    return arrivals
