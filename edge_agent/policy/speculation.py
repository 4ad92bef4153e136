"""When to draft, when to send drafts for verification, when drafting does not pay. Pure: estimates in, a decision out.

Times are seconds. A round carries its drafts up and is answered after `rtt_s` and one step of `step_s` in the cloud;
further rounds go out while earlier ones are in flight, so that only a wrong draft costs a round trip:

    seconds per token  =  max(draft_s, step_s / drafts per round)  +  P(wrong) * (rtt_s + step_s + lost drafting)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from isthmus.edge_agent.policy.averages import Average
from isthmus.models.messages import Committed

MIN_DRAFTS, MAX_DRAFTS = 4, 16  # of a round
MAX_ROUNDS = 4  # in flight at once
READ_TOKENS = 16  # that a reply has to have taken at least to say what reading one takes
MARGIN = 0.9  # drafting must look this much better than streaming: a wrong choice costs more than it saves
BINS = 10
MEMORY, LONG_MEMORY = 100, 500  # drafts that the averages remember: of this text, of all texts
PRIOR_WEIGHT = 8.0  # observations that the prior counts as, in each bin of confidence

ENOUGH_TOKENS = 12.0
RETRY_ANSWERS = 30  # after about so many, what was learned of drafts has faded
PREDICTED_TOKENS = 32.0  # measured tokens that the predicted latency counts as
FORGET_TOKEN = 0.98  # a measured token counts half after 34 others

Action = Literal["draft", "send", "wait"]


@dataclass(frozen=True, slots=True)
class LatencyModel:
    """What a token costs now, and how often a draft is right. Latencies in seconds."""

    rtt_s: float
    step_s: float  # one step of the cloud, its queue included
    draft_s: float
    acceptance: float
    measured_s: float | None = None  # measured latency of a token while drafting
    measured_tokens: float = 0.0  # tokens in that measurement, decayed

    @property
    def stream_s(self) -> float:
        """Latency of a token when the cloud decodes by itself."""
        return self.step_s

    @property
    def drafts(self) -> int:
        """Drafts per round: enough that the cloud keeps up with the device."""
        if self.draft_s <= 0:
            return MAX_DRAFTS
        return min(max(math.ceil(1.5 * self.step_s / self.draft_s), MIN_DRAFTS), MAX_DRAFTS)

    @property
    def verify_s(self) -> float:
        """Predicted latency of a token with drafts."""
        flow_s = max(self.draft_s, self.step_s / self.drafts)
        wrong = 1 - self.acceptance
        lost_s = self.drafts * self.draft_s / 2
        run = (1 - self.acceptance**self.drafts) / wrong if wrong > 0 else self.drafts
        first_s = self.drafts * self.draft_s / max(run, 1)  # nothing is in flight while the first round is drafted
        return flow_s + wrong * (self.rtt_s + self.step_s + lost_s + first_s)

    @property
    def drafting_s(self) -> float:
        """Latency of a token with drafts: predicted, and the more tokens were measured, measured."""
        if self.measured_s is None:
            return self.verify_s
        known = self.measured_tokens / (self.measured_tokens + PREDICTED_TOKENS)
        return self.verify_s + known * (self.measured_s - self.verify_s)

    @property
    def prefers_streaming(self) -> bool:
        """Whether the cloud decodes faster by itself."""
        return self.drafting_s > MARGIN * self.stream_s


def next_action(
    latency: LatencyModel, confidences: Sequence[float], sent: int, in_flight: int, exhausted: bool
) -> Action:
    """What to do with drafts of these calibrated confidences, the first `sent` of which are in rounds in flight.

    `exhausted`: the source has no further draft, or none may follow.
    """
    unsent = len(confidences) - sent
    likely = math.prod(confidences)
    worthless = likely * latency.stream_s <= latency.draft_s and len(confidences) > 0  # P(all right) * what it saves
    full = unsent >= latency.drafts
    if not exhausted and not worthless and not full:
        return "draft"
    if in_flight == 0 or (full and in_flight < MAX_ROUNDS):
        return "send"
    return "wait"


class Acceptance:
    """How often drafts of each confidence are accepted: an online calibration over ten bins."""

    def __init__(self, prior: float = 0.9) -> None:
        self._right = [PRIOR_WEIGHT * (prior + (1 - prior) * (2 * bin_ + 1 - BINS) / BINS) for bin_ in range(BINS)]
        self._seen = [PRIOR_WEIGHT] * BINS
        self._overall = self._usual = self._prior = prior

    @property
    def overall(self) -> float:
        """Acceptance rate of the last two hundred drafts or so, recent ones counted more."""
        return self._overall

    def calibrated(self, confidence: float) -> float:
        """Acceptance rate of drafts of this confidence."""
        bin_ = self._bin(confidence)
        return self._right[bin_] / self._seen[bin_]

    def observe(self, confidence: float, right: bool) -> None:
        """One draft was accepted or rejected."""
        bin_ = self._bin(confidence)
        self._right[bin_] += right
        self._seen[bin_] += 1
        self.expect(right)

    def expect(self, likely: float) -> None:
        """One more draft whose acceptance has this probability."""
        self._overall += (likely - self._overall) / MEMORY
        self._usual += (likely - self._usual) / LONG_MEMORY

    def fade(self) -> None:
        """Another text may follow, which is drafted better or worse; what is not observed again is forgotten."""
        self._overall = (self._overall + self._usual) / 2
        self._usual += (self._prior - self._usual) / RETRY_ANSWERS

    def _bin(self, confidence: float) -> int:
        return min(max(int(confidence * BINS), 0), BINS - 1)


class MeasuredLatency:
    """Seconds per token that drafting took lately."""

    def __init__(self) -> None:
        self._seconds = self._tokens = 0.0

    @property
    def value(self) -> float | None:
        """None before there were enough tokens."""
        return self._seconds / self._tokens if self._tokens >= ENOUGH_TOKENS else None

    @property
    def tokens(self) -> float:
        """Tokens measured, decayed."""
        return self._tokens

    def fade(self) -> None:
        """Another text may follow, which is drafted better or worse."""
        self._seconds, self._tokens = self._seconds / 2, self._tokens / 2

    def observe(self, seconds: float, tokens: int) -> None:
        """So many tokens took so long."""
        keep = FORGET_TOKEN**tokens
        self._seconds = keep * self._seconds + seconds
        self._tokens = keep * self._tokens + tokens


@dataclass
class SpeculationStats:
    """What an agent has learned about a source of drafts and the cloud's speed; it outlives an answer."""

    draft_s: Average = field(default_factory=lambda: Average(0.02))
    step_s: Average = field(default_factory=lambda: Average(0.1))  # slow until known: then drafting is tried
    acceptance: Acceptance = field(default_factory=Acceptance)
    measured: MeasuredLatency = field(default_factory=MeasuredLatency)
    read_s: Average = field(default_factory=lambda: Average(0.0))  # of a token of a prompt; 0: not known

    @property
    def reading_s(self) -> float:
        """What reading a token of a prompt takes, which is never more than a step; until it is known, a part of one."""
        step_s = self.step_s.value
        return min(self.read_s.value or step_s / READ_TOKENS, step_s)

    def latency(self, rtt_s: float) -> LatencyModel:
        """What a token costs over a link of this round trip."""
        step_s, draft_s, acceptance = self.step_s.value, self.draft_s.value, self.acceptance.overall
        return LatencyModel(rtt_s, step_s, draft_s, acceptance, self.measured.value, self.measured.tokens)

    def observe_reply(self, committed: Committed) -> None:
        """A reply that took one forward pass says what a step of the cloud takes, a long one what reading does."""
        fresh = committed.processed.tokens - committed.processed.repeated
        if fresh >= READ_TOKENS:
            self.read_s.observe(committed.compute_s / fresh)
        if committed.passes == 1:
            self.step_s.observe(committed.queue_s + committed.compute_s)

    def fade(self) -> None:
        """Another text may follow: what was learned of this one says less of that."""
        self.measured.fade()
        self.acceptance.fade()
