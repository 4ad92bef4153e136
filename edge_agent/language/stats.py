"""What one answer cost and why it went the way it went, counted while it is generated."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from isthmus.edge_agent.language.request import Span, Summary, Token
from isthmus.edge_agent.language.sequence import AnswerSequence
from isthmus.edge_agent.policy.arms import Arm
from isthmus.models.messages import Committed, Processed

REQUESTED = "requested"


class WorkClock:
    """An answer's own time: it stands still while whoever reads the answer has not asked for the next token."""

    def __init__(self) -> None:
        self.paused_s = 0.0

    def now_s(self) -> float:
        """Monotonic seconds without the pauses."""
        return time.monotonic() - self.paused_s

    def pausing(self, tokens: Iterator[Token]) -> Iterator[Token]:
        """`tokens`, with a pause from each token until the next one is asked for."""
        for token in tokens:
            since_s = time.monotonic()
            yield token
            self.paused_s += time.monotonic() - since_s


@dataclass
class GenerationStats:
    """Counts of one answer; the fields of Summary say what each means.

    `fell_back`: the last token is not the arm's own, for want of a cloud. `reason`: why this arm; `problem`: what went
    wrong on the way, which `why` then says instead.
    """

    accepted: int = 0
    rejected: int = 0
    rounds: int = 0
    passes: int = 0
    prefill_passes: int = 0
    opening_bytes: int = 0
    cached: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    cloud_s: float = 0.0
    rtt_s: float | None = None
    degraded: bool = False
    fell_back: bool = False
    reason: str = REQUESTED
    problem: str | None = None
    device: Processed = field(default_factory=Processed)
    cloud: Processed = field(default_factory=Processed)
    spans: list[Span] = field(default_factory=list)
    clock: WorkClock = field(default_factory=WorkClock)
    _replied: bool = False

    @property
    def why(self) -> str:
        return self.problem or self.reason

    def count_token(self, arm: Arm, why: str) -> None:
        """One more token by `arm`, for this reason if it is the first of a span."""
        if self.spans and self.spans[-1].arm == arm:
            self.spans[-1] = replace(self.spans[-1], tokens=self.spans[-1].tokens + 1)
        else:
            self.spans.append(Span(arm, 1, why))

    def count_reply(self, committed: Committed, first: bool) -> None:
        """One reply of the cloud. `first` after an opening: its forward passes but the last only read the prompt."""
        reading = max(committed.passes - 1, 0) if first else 0
        self.rounds += not committed.extension
        self.prefill_passes += reading
        self.passes += committed.passes - reading
        self.count_cost(committed)

    def count_cost(self, committed: Committed) -> None:
        """What the cloud spent on a reply, and how much of the session it still held."""
        if not self._replied:  # sessions opened later find what this answer left there
            self.cached = committed.held
        self._replied = True
        self.cloud_s += committed.queue_s + committed.compute_s
        self.cloud += committed.processed

    def degrade(self, problem: str) -> None:
        """The device goes on by itself. `problem` is what to say unless an error was noted before."""
        self.degraded = True
        self.problem = self.problem or problem

    def summary(self, sequence: AnswerSequence) -> Summary:
        """What is known of the answer at its end."""
        return Summary(
            finish=sequence.finish,
            prompt_tokens=len(sequence.request.prompt),
            tokens=sequence.generated,
            arm=sequence.request.arm,
            why=self.why,
            accepted=self.accepted,
            rejected=self.rejected,
            rounds=self.rounds,
            passes=self.passes,
            prefill_passes=self.prefill_passes,
            opening_bytes=self.opening_bytes,
            cached=min(self.cached, len(sequence.request.prompt)),
            bytes_up=self.bytes_up,
            bytes_down=self.bytes_down,
            rtt_s=self.rtt_s,
            cloud_s=self.cloud_s,
            degraded=self.degraded,
            spans=tuple(self.spans),
            device=self.device,
            cloud=self.cloud,
        )
