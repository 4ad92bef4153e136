"""Which sessions get memory for their rounds, and which tokens the next step computes.

Pure: sessions come in as values, plans go out. Knows nothing about tensors, clocks or the event loop.

    requests, budget  -- plan_memory --> grants     equal shares of the budget for peers, running sequences first
    candidates, width -- plan_step -->   StepPlan   equal shares of one forward pass for peers

A peer is one connection. The engine carries a plan of memory out before it asks for the plan of a step, since an
eviction changes what is left to compute.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter, defaultdict, deque
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from isthmus.cloud_service.language.kv_budget import KVBudget

PEER_PROMPTS = (
    2  # of a peer at a time, which fill its share of a step: with more, each would come later, and none sooner
)
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
    peer: str = ""
    prompt: bool = False  # it has computed nothing but its prompt so far
    aged: bool = False  # it has waited so long that others do not overtake it any more

    @property
    def running_order(self) -> tuple[int, int]:
        return self.first_step, self.ticket

    @property
    def waiting_order(self) -> tuple[int, int]:
        return self.last_step, self.ticket

    def is_protected(self, step: int) -> bool:
        """Whether a running sequence keeps its turn: in the middle of a round, or with memory for a few steps only."""
        running = self.round_steps > 0 or step - self.first_step < PROTECTED_STEPS
        return running and self.cache_bytes is not None


@dataclass(frozen=True, slots=True)
class RestingCache:
    """The cache of a session between two rounds, which computed tokens a few steps ago."""

    session: bytes
    peer: str
    cache_bytes: int


@dataclass(frozen=True, slots=True)
class Grant:
    """`session` gets the memory that it asked for, after the states of the `evicted` sessions are dropped."""

    session: bytes
    evicted: tuple[bytes, ...]


def plan_memory(
    requests: Sequence[MemoryRequest], budget: KVBudget, step: int, resting: Sequence[RestingCache] = ()
) -> list[Grant]:
    """Grant memory in order, by eviction where necessary, but never from a session that has been granted before.

    Every peer has an equal share of the budget and may use what others leave; a single peer's share is everything.

    1. running sequences within their peer's share, by `first_step`; the first of all always gets what it needs
    2. waiting sequences within their peer's share, and aged ones; next is always the peer that was granted least
    3. running sequences beyond the share: the last of them are evicted for those before
    4. the other waiting sequences, in the same turns

    The third prompt of a peer waits until one of two has ended. Nothing beyond a share evicts `resting` caches within
    their peer's. Small sequences overtake a large one that does not fit until it is aged: then it blocks the waiting
    ones of each peer that was granted as much as its own. `budget` is not changed.
    """
    running = sorted((each for each in requests if each.is_protected(step)), key=lambda each: each.running_order)
    waiting = [each for each in requests if not each.is_protected(step)]
    plan = MemoryPlan(budget.copy(), len({each.peer for each in requests} | {each.peer for each in resting}))
    for place, request in enumerate(running):
        if not place or plan.within_share(request):
            plan.grant(request)
    beyond = [each for each in running if each.session not in plan.grants]
    late, spared = [each.session for each in beyond], plan.within_shares(resting)
    for request in plan.in_turns(waiting):
        if plan.within_share(request):
            plan.admit(request, late=late)
        elif request.aged:
            plan.admit(request, keep=[*late, *spared])
    for request in beyond:
        plan.grant(request, keep=spared)
    for request in plan.in_turns(each for each in waiting if each.session not in plan.grants):
        plan.admit(request, keep=spared)
    return list(plan.grants.values())


class MemoryPlan:
    """Grants so far, on a ledger of its own, and the bytes that they give to each peer."""

    def __init__(self, ledger: KVBudget, peers: int) -> None:
        self.grants: dict[bytes, Grant] = {}
        self._ledger = ledger
        self._share_bytes = ledger.budget_bytes // peers if peers > 1 else math.inf
        self._left_bytes = ledger.budget_bytes  # what is not granted, evictable or free
        self._peer_bytes: Counter[str] = Counter()
        self._peer_prompts: Counter[str] = Counter()
        self._blocked_bytes = math.inf  # a peer that was granted as much gets nothing new
        self._evicted: set[bytes] = set()

    def within_share(self, request: MemoryRequest) -> bool:
        """Whether its peer stays within its share with it."""
        return self._peer_bytes[request.peer] + request.needs_bytes <= self._share_bytes

    def within_shares(self, resting: Sequence[RestingCache]) -> list[bytes]:
        """Sessions whose caches fit into their peers' shares beside what was granted; none of a single peer."""
        held, chosen = self._peer_bytes.copy(), list[bytes]()
        for each in resting:
            held[each.peer] += each.cache_bytes
            if held[each.peer] <= self._share_bytes < math.inf:
                chosen.append(each.session)
        return chosen

    def in_turns(self, waiting: Iterable[MemoryRequest]) -> Iterator[MemoryRequest]:
        """The request that has waited longest of the peer that was granted least, again and again."""
        queues: defaultdict[str, deque[MemoryRequest]] = defaultdict(deque)
        for request in sorted(waiting, key=lambda each: each.waiting_order):
            queues[request.peer].append(request)
        heap = [(self._peer_bytes[peer], queue[0].waiting_order, peer) for peer, queue in queues.items()]
        heapq.heapify(heap)
        while heap:
            peer = heapq.heappop(heap)[-1]
            yield queues[peer].popleft()
            if queues[peer]:
                heapq.heappush(heap, (self._peer_bytes[peer], queues[peer][0].waiting_order, peer))

    def admit(self, request: MemoryRequest, *, keep: Collection[bytes] = (), late: Sequence[bytes] = ()) -> None:
        """Grant a waiting sequence what it needs, unless an aged one blocks its peer. If it is aged it may block."""
        if request.prompt and self._peer_prompts[request.peer] >= PEER_PROMPTS:
            return
        granted = self._peer_bytes[request.peer]
        if granted < self._blocked_bytes and not self.grant(request, keep=keep, late=late) and request.aged:
            self._blocked_bytes = granted

    def grant(self, request: MemoryRequest, *, keep: Collection[bytes] = (), late: Sequence[bytes] = ()) -> bool:
        """False when there is no room. A round that an eviction of this plan has lost is passed over.

        Sessions in `keep` are not evicted; those in `late` only after all others, the last of them first.
        """
        name = request.session
        if name in self._evicted and not request.restartable:
            return True
        if request.needs_bytes > self._left_bytes:
            return False
        staying = {*self.grants, *keep} if keep else self.grants.keys()
        victims = self._ledger.victims(name, request.needs_bytes, staying, late)
        if victims is None:
            return False
        for victim in victims:
            self._ledger.drop(victim)
        self._evicted.update(victims)
        cache_bytes = 0 if name in self._evicted else request.cache_bytes or 0
        size_bytes = max(request.needs_bytes, cache_bytes)
        self._ledger.record(name, size_bytes, 0.0, attached=True)
        self._left_bytes -= size_bytes
        self._peer_bytes[request.peer] += size_bytes
        self._peer_prompts[request.peer] += request.prompt
        self.grants[name] = Grant(name, tuple(victims))
        return True


@dataclass(frozen=True, slots=True)
class Candidate:
    """Tokens that one session could have in the next step. Only candidates of equal `kind` can share a step."""

    ticket: int
    tokens: int
    last_step: int
    kind: Hashable = None
    peer: str = ""


def plan_step(
    candidates: Sequence[Candidate], width: int, served: Mapping[str, int] = MappingProxyType({})
) -> StepPlan:
    """The next step, of `width` tokens at most. `served`: the last step that computed tokens of a peer.

    Peers have equal shares; what one does not need, others get. The peer that was served least recently comes first,
    and its candidate that has waited longest decides the kind.
    """
    queues: defaultdict[str, list[Candidate]] = defaultdict(list)
    for each in sorted(candidates, key=lambda each: (each.last_step, each.ticket)):
        if each.tokens:
            queues[each.peer].append(each)
    turns = sorted(
        queues.values(),
        key=lambda queue: (served.get(queue[0].peer, queue[0].last_step), queue[0].last_step, queue[0].ticket),
    )
    of_kind = [[each for each in queue if each.kind == turns[0][0].kind] for queue in turns]
    rows = equal_shares([sum(each.tokens for each in queue) for queue in of_kind], width)
    return [part for queue, count in zip(of_kind, rows, strict=True) for part in share_rows(queue, count)]


def equal_shares(demands: Sequence[int], total: int) -> list[int]:
    """`total` handed out one by one in turns, to each no more than its demand."""
    shares, left = [0] * len(demands), total
    while left and (unmet := [place for place, demand in enumerate(demands) if shares[place] < demand]):
        more = max(left // len(unmet), 1)
        for place in unmet[:left]:
            granted = min(more, demands[place] - shares[place])
            shares[place] += granted
            left -= granted
    return shares


def share_rows(queue: Sequence[Candidate], rows: int) -> StepPlan:
    """The candidates of one peer in order, each with half of the rows at most; then what is left, in the same order.

    So a long prompt fills what others leave and delays nobody.
    """
    shares: dict[int, int] = {}
    left = rows
    for limit in (max(rows // 2, 1), rows):
        for each in queue:
            share = shares.get(each.ticket, 0)
            more = min(max(min(each.tokens, limit) - share, 0), left)
            if more:
                shares[each.ticket] = share + more
                left -= more
    return list(shares.items())
