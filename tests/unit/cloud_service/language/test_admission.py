from __future__ import annotations

from dataclasses import dataclass, field
from itertools import count

from hypothesis import given
from hypothesis import strategies as st

from isthmus.cloud_service.language.admission import MEASURED_STEPS, Backlog, StepTime
from isthmus.cloud_service.language.kv_budget import KVBudget
from isthmus.cloud_service.language.scheduler import Candidate, MemoryRequest, plan_memory, plan_step

WIDTH = 16


def test_a_step_takes_the_median_of_the_last_ones() -> None:
    step = StepTime()
    assert step.seconds == 0
    for seconds in (0.03, 9.0, 0.05):
        step.observe(seconds)
    assert step.seconds == 0.05
    for _ in range(MEASURED_STEPS):
        step.observe(0.01)
    assert step.seconds == 0.01


def backlog(*sequences: tuple[str, int]) -> Backlog:
    """Of (peer, tokens)."""
    held = Backlog(WIDTH)
    for peer, tokens in sequences:
        held.add(peer, tokens)
    return held


def test_without_others_nothing_is_waited_for() -> None:
    assert backlog().wait_steps("one", 5000) == 0


def test_of_its_own_peer_a_sequence_waits_for_everything_and_of_another_for_as_much_as_its_own() -> None:
    many = [("many", 1600)] * 10
    assert backlog(*many).wait_steps("many", 160) == 1000
    assert backlog(*many).wait_steps("one", 160) == 10
    assert backlog(*many, ("few", 16)).wait_steps("one", 160) == 11


def test_those_that_decode_take_no_more_rows_than_their_peers_share() -> None:
    decoding = [("many", 1)] * 64
    assert backlog(*decoding).wait_steps("one", 160) == 160 / 8 - 160 / 16
    assert backlog(*decoding[:4]).wait_steps("one", 120) == 120 / 12 - 120 / 16


tokens_by_peer = st.lists(st.tuples(st.sampled_from("ABC"), st.integers(2, 400)), max_size=8)


@given(tokens_by_peer, st.integers(2, 400))
def test_the_wait_is_about_what_the_scheduler_then_gives(others: list[tuple[str, int]], tokens: int) -> None:
    """Run to the end with `plan_step`: peers' shares of whole rows, and a peer's sequences in turns."""
    left = {ticket: [peer, size, 0] for ticket, (peer, size) in enumerate([*others, ("A", tokens)])}
    served: dict[str, int] = {}
    for step in count(1):
        plan = plan_step(
            [Candidate(ticket, size, at, peer=peer) for ticket, (peer, size, at) in left.items()], WIDTH, served
        )
        for ticket, rows in plan:
            left[ticket][1:] = [left[ticket][1] - rows, step]
            served[left[ticket][0]] = step
        if not left[len(others)][1]:
            break
    peers = len({"A", *(peer for peer, _ in others)})
    assert step <= backlog(*others).wait_steps("A", tokens) + tokens / WIDTH + 2 * peers + 2


@dataclass
class Prompt:
    """In a queue in virtual time."""

    peer: str
    left: int
    arrived: int
    last_step: int
    ended: int | None = None

    def request(self, name: bytes) -> MemoryRequest:
        started = self.last_step > self.arrived
        cache_bytes = 1 if started else None
        return MemoryRequest(
            name, self.arrived, 1, cache_bytes, int(started), 0, self.last_step, True, self.peer, prompt=True
        )


@dataclass
class Service:
    """The scheduler in steps of equal duration; a new prompt is refused when it would wait longer than `limit`."""

    limit: float
    prompts: list[Prompt] = field(default_factory=list)
    served: dict[str, int] = field(default_factory=dict)
    step: int = 0
    refused: int = 0

    def arrive(self, peer: str, tokens: int) -> None:
        held = backlog(*((each.peer, each.left) for each in self.prompts if each.left))
        if held.wait_steps(peer, tokens) > self.limit:
            self.refused += 1
        else:
            self.prompts.append(Prompt(peer, tokens, self.step, self.step))

    def run(self) -> None:
        self.step += 1
        waiting = {bytes([place % 256, place // 256]): each for place, each in enumerate(self.prompts) if each.left}
        grants = plan_memory([each.request(name) for name, each in waiting.items()], KVBudget(1 << 40, 1.0), self.step)
        granted = [(name[0] + 256 * name[1], waiting[name]) for name in (grant.session for grant in grants)]
        candidates = [Candidate(place, each.left, each.last_step, peer=each.peer) for place, each in granted]
        for place, rows in plan_step(candidates, WIDTH, self.served):
            prompt = self.prompts[place]
            prompt.left, prompt.last_step = prompt.left - rows, self.step
            self.served[prompt.peer] = self.step
            prompt.ended = None if prompt.left else self.step

    def good(self, within: int) -> int:
        """Prompts whose first token came in time."""
        return sum(each.ended is not None and each.ended - each.arrived <= within for each in self.prompts)


def played(limit: float, load: float, steps: int = 1000, tokens: int = 160, peers: int = 4) -> Service:
    """`load` times the capacity arrives, at equal intervals, of the peers in turns."""
    service, arrived = Service(limit), 0
    for step in range(steps):
        while arrived * tokens < step * WIDTH * load:
            service.arrive(str(arrived % peers), tokens)
            arrived += 1
        service.run()
    return service


def test_at_twice_the_capacity_as_many_prompts_are_in_time_as_can_be_computed() -> None:
    """A first token is in time within 150 steps; without a limit the queue grows."""
    capacity = 1000 * WIDTH // 160
    assert played(limit=50, load=2).good(150) >= 0.9 * capacity
    assert played(limit=1e9, load=2).good(150) <= 0.25 * capacity
    assert played(limit=50, load=0.9).refused == 0


def test_a_neighbour_beyond_the_capacity_does_not_delay_others() -> None:
    """One peer sends twice what can be computed, the other a prompt now and then."""
    service = Service(limit=100)
    for step in range(1000):
        for _ in range(1 + step % 2):
            service.arrive("many", 220)
        if step % 50 == 0:
            service.arrive("one", 160)
        service.run()
    of_one = [each for each in service.prompts if each.peer == "one"]
    assert len(of_one) == 20
    assert all(each.ended and each.ended - each.arrived <= 2 * 160 // WIDTH + 1 for each in of_one)
