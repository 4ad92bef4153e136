"""Which new sequences would begin too late. Pure: backlogs and times come in as values.

every sequence of a peer: tokens still to compute  -->  Backlog  -->  wait_s of one more
"""

from __future__ import annotations

from collections import Counter, deque
from statistics import median

MEASURED_STEPS = 32  # whose median says what a step takes: one slow step refuses nobody


class StepTime:
    """What a step takes, as measured."""

    def __init__(self) -> None:
        self._seconds: deque[float] = deque(maxlen=MEASURED_STEPS)

    def observe(self, seconds: float) -> None:
        """A step took `seconds`."""
        self._seconds.append(seconds)

    @property
    def seconds(self) -> float:
        """0 before the first step."""
        return median(self._seconds) if self._seconds else 0.0


class Backlog:
    """Tokens that are still to be computed, by peer."""

    def __init__(self, width: int) -> None:
        """`width`: tokens of one step."""
        self._width = width
        self._prompts: Counter[str] = Counter()  # tokens
        self._decoding: Counter[str] = Counter()  # sequences with a single token in each step

    def add(self, peer: str, tokens: int) -> None:
        """One more sequence, whose round needs `tokens`."""
        if tokens > 1:
            self._prompts[peer] += tokens
        else:
            self._decoding[peer] += 1

    def wait_steps(self, peer: str, tokens: int) -> float:
        """Steps that a new sequence of `tokens` would wait for others, in addition to those that it needs alone.

        Peers have equal shares, so that each of the others computes at most as much as `peer` in that time.
        """
        own = self._prompts[peer] + tokens
        total = own + sum(min(other, own) for name, other in self._prompts.items() if name != peer)
        peers = {peer, *(name for name, count in (self._prompts + self._decoding).items() if count)}
        share = self._width // len(peers)
        rows = self._width - sum(min(count, share) for count in self._decoding.values())
        return total / max(rows, 1) - tokens / self._width
