"""Which sessions get memory for their rounds, and which tokens the next step computes.

Pure: sessions come in as values, plans go out. Knows nothing about tensors, clocks or the event loop.

    requests, budget  -- plan_memory --> grants     running sequences keep theirs; others: first come, first served
    candidates, width -- plan_step -->   StepPlan   fair shares of one forward pass

The engine carries a plan of memory out before it asks for the plan of a step, since an eviction changes what is left
to compute.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from isthmus.cloud_service.language.kv_budget import KVBudget

PROTECTED_STEPS = 32  # how long a session keeps new memory while others wait: less would evict at every step

StepPlan = list[tuple[int, int]]  # (ticket, tokens)


@dataclass(frozen=True, slots=True)
class MemoryRequest:
    """A session with a scheduled round, which needs its whole state in memory. Steps are numbered from 0."""

    session: bytes
    ticket: int  # in order of opening
    needs_bytes: int  # of its state when the round has ended
    cache_bytes: int | None  # None: no state is held
    round_steps: int  # that the round has had
    first_step: int  # since when the state is complete, or else when its memory was granted
    last_step: int  # that computed tokens of the session
    restartable: bool  # an eviction does not lose the round

    def is_protected(self, step: int) -> bool:
        """Whether a running sequence keeps its turn: in the middle of a round, or with memory for a few steps only."""
        running = self.round_steps > 0 or step - self.first_step < PROTECTED_STEPS
        return running and self.cache_bytes is not None


@dataclass(frozen=True, slots=True)
class Grant:
    """`session` gets the memory that it asked for, after the states of the `evicted` sessions are dropped."""

    session: bytes
    evicted: tuple[bytes, ...]


def plan_memory(requests: Sequence[MemoryRequest], budget: KVBudget, step: int) -> list[Grant]:
    """Grant memory in order, by eviction where necessary, but never from a session that has been granted before.

    Protected sessions come first, in order of `first_step`; the first of them always gets what it needs. Waiting
    sessions follow in order of `last_step`, up to the first that does not fit: or small ones would overtake a large
    one for ever. `budget` is not changed.
    """
    protected = [request for request in requests if request.is_protected(step)]
    waiting = [request for request in requests if not request.is_protected(step)]
    memory = MemoryPlan(budget.copy())
    for request in sorted(protected, key=lambda request: (request.first_step, request.ticket)):
        memory.grant(request)
    for request in sorted(waiting, key=lambda request: (request.last_step, request.ticket)):
        if not memory.grant(request):
            break
    return list(memory.grants.values())


class MemoryPlan:
    """Grants so far, on a ledger of its own."""

    def __init__(self, ledger: KVBudget) -> None:
        self.grants: dict[bytes, Grant] = {}
        self._ledger = ledger
        self._evicted: set[bytes] = set()

    def grant(self, request: MemoryRequest) -> bool:
        """False when there is no room. A round that an eviction of this plan has lost is passed over."""
        name = request.session
        if name in self._evicted and not request.restartable:
            return True
        victims = self._ledger.victims(name, request.needs_bytes, self.grants.keys())
        if victims is None:
            return False
        for victim in victims:
            self._ledger.drop(victim)
        self._evicted.update(victims)
        cache_bytes = 0 if name in self._evicted else request.cache_bytes or 0
        self._ledger.record(name, max(request.needs_bytes, cache_bytes), 0.0, attached=True)
        self.grants[name] = Grant(name, tuple(victims))
        return True


@dataclass(frozen=True, slots=True)
class Candidate:
    """Tokens that one session could have in the next step. Only candidates of equal `kind` can share a step."""

    ticket: int
    tokens: int
    last_step: int
    kind: Hashable = None


def plan_step(candidates: Sequence[Candidate], width: int) -> StepPlan:
    """The next step, of `width` tokens at most.

    The candidates that have waited longest come first, each with half a step at most; what is left is shared among
    them in the same order. So a long prompt fills what others leave and delays nobody. The first decides the kind.
    """
    order = sorted((each for each in candidates if each.tokens), key=lambda each: (each.last_step, each.ticket))
    order = [each for each in order if each.kind == order[0].kind]
    shares: dict[int, int] = {}
    left = width
    for limit in (max(width // 2, 1), width):
        for each in order:
            share = shares.get(each.ticket, 0)
            more = min(max(min(each.tokens, limit) - share, 0), left)
            if more:
                shares[each.ticket] = share + more
                left -= more
    return list(shares.items())
