"""When to draft, when to ask the cloud, and when drafting does not pay. Pure: estimates in, a decision out.

Times are seconds. A round carries its drafts up and is answered after `rtt_s` and one pass of `pass_s` in the cloud;
further rounds go out while earlier ones are under way, so that only a wrong draft costs a round trip:

    seconds a token  =  max(draft_s, pass_s / drafts a round)  +  P(wrong) * (rtt_s + pass_s + lost drafting)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

MIN_DRAFTS, MAX_DRAFTS = 4, 16  # of a round
MAX_ROUNDS = 4  # under way at once
MARGIN = 0.9  # drafting must look this much better than streaming: a wrong choice costs more than it saves
BINS = 10
MEMORY, LONG_MEMORY = 100, 500  # drafts: of this text, of all
PRIOR_WEIGHT = 8.0  # observations that the prior counts for, in each bin of confidence

ENOUGH_TOKENS = 12.0
RETRY_ANSWERS = 30  # after about so many, what was learnt of drafts is not believed any more
RECKONED_TOKENS = 32.0  # measured ones that what is reckoned counts as much as
FORGET_TOKEN = 0.98  # a token counts half after 34 others

Step = Literal["draft", "send", "wait"]


@dataclass(frozen=True, slots=True)
class LatencyModel:
    """What things cost now, and how often a draft is right."""

    rtt_s: float
    pass_s: float  # one forward pass in the cloud, waiting in its queue included
    draft_s: float
    acceptance: float
    measured_s: float | None = None  # seconds a token that drafting really took lately
    measured_tokens: float = 0.0  # that say so

    @property
    def stream_s(self) -> float:
        """Seconds a token when the cloud decodes by itself."""
        return self.pass_s

    @property
    def drafts(self) -> int:
        """Drafts a round: enough that the cloud keeps up with the device."""
        if self.draft_s <= 0:
            return MAX_DRAFTS
        return min(max(math.ceil(1.5 * self.pass_s / self.draft_s), MIN_DRAFTS), MAX_DRAFTS)

    @property
    def verify_s(self) -> float:
        """Seconds a token with drafts."""
        flow_s = max(self.draft_s, self.pass_s / self.drafts)
        wrong = 1 - self.acceptance
        lost_s = self.drafts * self.draft_s / 2
        run = (1 - self.acceptance**self.drafts) / wrong if wrong > 0 else self.drafts
        first_s = self.drafts * self.draft_s / max(run, 1)  # nothing is under way while the first round is drafted
        return flow_s + wrong * (self.rtt_s + self.pass_s + lost_s + first_s)

    @property
    def drafting_s(self) -> float:
        """Seconds a token with drafts: as reckoned, and the more is known of it, as it was lately."""
        if self.measured_s is None:
            return self.verify_s
        known = self.measured_tokens / (self.measured_tokens + RECKONED_TOKENS)
        return self.verify_s + known * (self.measured_s - self.verify_s)

    @property
    def streams(self) -> bool:
        """Whether the cloud had better decode by itself."""
        return self.drafting_s > MARGIN * self.stream_s


def next_step(pace: LatencyModel, confidences: Sequence[float], sent: int, under_way: int, exhausted: bool) -> Step:
    """What to do with drafts of these calibrated confidences, the first `sent` of which are in rounds under way.

    `exhausted`: the source has no idea how to go on, or nothing may follow.
    """
    unsent = len(confidences) - sent
    likely = math.prod(confidences)
    worthless = likely * pace.stream_s <= pace.draft_s and len(confidences) > 0  # P(all right) * what it saves
    full = unsent >= pace.drafts
    if not exhausted and not worthless and not full:
        return "draft"
    if under_way == 0 or (full and under_way < MAX_ROUNDS):
        return "send"
    return "wait"


class Acceptance:
    """How often drafts of each confidence turned out right: an online calibration over ten bins."""

    def __init__(self, prior: float = 0.9) -> None:
        self._right = [PRIOR_WEIGHT * (prior + (1 - prior) * (2 * bin_ + 1 - BINS) / BINS) for bin_ in range(BINS)]
        self._seen = [PRIOR_WEIGHT] * BINS
        self._overall = self._usual = self._prior = prior

    @property
    def overall(self) -> float:
        """Of the last two hundred drafts or so, the last ones most."""
        return self._overall

    def calibrated(self, confidence: float) -> float:
        bin_ = self._bin(confidence)
        return self._right[bin_] / self._seen[bin_]

    def observe(self, confidence: float, right: bool) -> None:
        bin_ = self._bin(confidence)
        self._right[bin_] += right
        self._seen[bin_] += 1
        self.expect(right)

    def expect(self, likely: float) -> None:
        """One more draft that is right as likely as this, as far as anybody knows."""
        self._overall += (likely - self._overall) / MEMORY
        self._usual += (likely - self._usual) / LONG_MEMORY

    def fade(self) -> None:
        """Another text may follow, which is drafted better or worse. What is not seen any more is forgotten."""
        self._overall = (self._overall + self._usual) / 2
        self._usual += (self._prior - self._usual) / RETRY_ANSWERS

    def _bin(self, confidence: float) -> int:
        return min(max(int(confidence * BINS), 0), BINS - 1)


class MeasuredLatency:
    """Seconds a token that drafting really took lately."""

    def __init__(self) -> None:
        self._seconds = self._tokens = 0.0

    @property
    def value(self) -> float | None:
        """None before there were enough tokens to say."""
        return self._seconds / self._tokens if self._tokens >= ENOUGH_TOKENS else None

    @property
    def tokens(self) -> float:
        """That say so, old ones counted less."""
        return self._tokens

    def fade(self) -> None:
        """Another text may follow, which is drafted better or worse."""
        self._seconds, self._tokens = self._seconds / 2, self._tokens / 2

    def observe(self, seconds: float, tokens: int) -> None:
        keep = FORGET_TOKEN**tokens
        self._seconds = keep * self._seconds + seconds
        self._tokens = keep * self._tokens + tokens
