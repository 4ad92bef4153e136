"""Which arm makes an answer's next tokens. Pure: estimates in, a plan out, which says why.

The dial is a promise with a number: the share of an answer's tokens that are to be what the cloud's model would choose.
`cloud` and `verify` keep any. The device's own copy keeps it by asking the cloud for single tokens, those that its
judge is not sure enough of:

    seconds a token  =  device  +  share asked * (round trip + a pass in the cloud - what is decided meanwhile)
    wrong tokens     =  those that the judge lets through; how many that is, calibration says

Source: token-level routing by the small model's doubt (CITER, Zheng et al., 2025; U-HLM, Oh et al., 2024), with doubt
calibrated against the cloud model's own choice. Not by the prompt: neither it nor the first tokens of an answer say how
often the copy will be wrong in the rest (correlation below 0.2 on Spec-Bench).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from isthmus.edge_agent.language.request import Arm
from isthmus.edge_agent.policy.estimates import Average
from isthmus.edge_agent.policy.prices import Objective, Prices
from isthmus.edge_agent.policy.speculation import Acceptance, LatencyModel
from isthmus.models.language.handoff.manifest import OffloadLevel

KNOWN_TOKENS, PRIOR_TOKENS = 128, 32  # that say how often the device asks: the last ones, and the bundle's word
GUESSED, PRIOR_GUESSES = 0.7, 16  # share of questions that are answered as the device guessed: of so many more
KEPT_SPAN, RECKONED_S = 0.95, 0.3  # of what spans before took, with each; so much of reckoning is taken for right
FADING = 8  # a share of one in so many is forgotten with each answer
MARGIN = 0.9  # another arm than the one at work must look this much better: a change costs a round trip
STREAM_BYTES = 2.0  # that go up for a token: an opening, once an answer
ROUND_BYTES = 60.0  # of a round of drafts, or of a question for one token


@dataclass(frozen=True, slots=True)
class HandoffEstimate:
    """Layers shared: overall share of right tokens, share that the cloud completes, and of a pass for one of these."""

    quality: float
    asked: float
    work: float
    state_bytes: float


@dataclass(frozen=True, slots=True)
class RoutingGoal:
    """What the owner wants. `quality`: share of tokens that are to be the cloud model's choice."""

    quality: float
    objective: Objective = "fastest"
    prices: Prices = Prices()


@dataclass(frozen=True, slots=True)
class ArmEstimate:
    """An arm that keeps the quality, with what a token costs by it. `likely` and `asked` as in Level, for `edge`."""

    arm: Arm
    seconds: float
    usd: float
    likely: float = 0.0
    asked: float = 0.0
    slowness: float = 1.0

    def cost(self, objective: Objective) -> tuple[float, float]:
        return (self.seconds, self.usd) if objective == "fastest" else (self.usd, self.seconds)


@dataclass(frozen=True, slots=True)
class ArmPlan:
    """The arm for the next tokens. On `edge` the cloud is asked for those that are less than `likely` to be right.

    `asked`: which share that will be, as far as anybody knows. `reckoned_s`: what a token will take, before what was
    learnt of such reckoning.
    """

    arm: Arm
    likely: float
    why: str
    asked: float = 0.0
    reckoned_s: float = 0.0


@dataclass(frozen=True, slots=True)
class LocalEstimate:
    """The device's copy at a level: it asks for the share `asked`, of tokens less than `likely` to be right.

    overhead_s: of a question, beyond round trip and pass. guessed: share of questions that are answered as it guessed.
    slowness: how many times longer tokens took of late than was reckoned.
    """

    likely: float
    asked: float
    overhead_s: float = 0.0
    guessed: float = GUESSED
    slowness: float = 1.0

    def token_s(self, pace: LatencyModel, device_s: float) -> float:
        """What a token takes, at `device_s` each where it is sure."""
        return self.slowness * (device_s + self.asked * self.question_s(pace, device_s))

    def question_s(self, pace: LatencyModel, device_s: float) -> float:
        """What a question takes, less what the device, at `device_s` a token, decides meanwhile: until it doubts again.

        That counts if its guess was right.
        """
        whole_s, sure = pace.rtt_s + pace.pass_s + self.overhead_s, 1 - self.asked
        if self.asked <= 0 or device_s <= 0:
            return whole_s * (1 - self.guessed)
        run = sure * (1 - math.pow(sure, whole_s / device_s)) / self.asked  # tokens until the next doubt, or the answer
        return whole_s - self.guessed * min(run * device_s, whole_s)


class ConfidenceStats:
    """How sure the device's judge was of late, and so what share it will ask for: texts differ from one another."""

    def __init__(self, acceptance: Acceptance | None = None) -> None:
        """`acceptance`: of drafts, which are the same choices as those that the judge speaks of."""
        self._acceptance = acceptance or Acceptance()
        self._likely: deque[float] = deque(maxlen=KNOWN_TOKENS)
        self._guesses: deque[bool] = deque(maxlen=KNOWN_TOKENS)  # at what was asked for: whether they were right
        self._overhead_s = Average(0.0)
        self._took_s = self._reckoned_s = 0.0  # of tokens, old ones counted less

    def observe(self, likely: float) -> None:
        self._likely.append(likely)
        self._acceptance.expect(likely)

    def answered(self, guessed: bool, overhead_s: float) -> None:
        """A question was, as the device had guessed or not; it took so much longer than it should."""
        self._guesses.append(guessed)
        self._overhead_s.observe(overhead_s)

    def on(self, level: OffloadLevel) -> LocalEstimate:
        """With the share that will be asked for: by what the bundle says and what was seen."""
        seen = sum(likely < level.likely for likely in self._likely)
        asked = (PRIOR_TOKENS * level.asked + seen) / (PRIOR_TOKENS + len(self._likely))
        guessed = (PRIOR_GUESSES * GUESSED + sum(self._guesses)) / (PRIOR_GUESSES + len(self._guesses))
        slowness = (RECKONED_S + self._took_s) / (RECKONED_S + self._reckoned_s)
        return LocalEstimate(level.likely, asked, self._overhead_s.value, guessed, slowness)

    def took(self, seconds: float, reckoned_s: float) -> None:
        """What some tokens took, and what had been reckoned for them."""
        self._took_s = KEPT_SPAN * self._took_s + seconds
        self._reckoned_s = KEPT_SPAN * self._reckoned_s + reckoned_s

    def fade(self) -> None:
        """Another answer begins: the oldest are forgotten, so that an arm is tried again that was given up."""
        for _ in range(-(-len(self._likely) // FADING)):
            self._likely.popleft()


def level_for(levels: Sequence[OffloadLevel], quality: float) -> OffloadLevel | None:
    """The one that asks least and keeps the quality; None: not even the last one keeps it. `levels` rise."""
    return next((level for level in levels if 1 - level.wrong >= quality), None)


def offers(
    wish: RoutingGoal,
    pace: LatencyModel,
    drafts: bool,
    device_s: float,
    own: LocalEstimate | None,
    shared: HandoffEstimate | None,
) -> list[ArmEstimate]:
    """Every arm that keeps the wished quality. `drafts`: whether the device can draft at present, at this `pace`.

    `own`: how its copy keeps it, at `device_s` a token; None: not at all.
    """
    prices = wish.prices
    if drafts and not pace.streams:
        seconds = pace.drafting_s
        rounds = 1 / pace.drafts + 1 - pace.acceptance  # about: one ends full, or at a wrong draft
        found = [ArmEstimate("verify", seconds, prices.usd(rounds * ROUND_BYTES, rounds * pace.pass_s, seconds))]
    else:
        found = [ArmEstimate("cloud", pace.stream_s, prices.usd(STREAM_BYTES, pace.pass_s, 0.0))]
    if own is not None:
        usd = prices.usd(own.asked * ROUND_BYTES, own.asked * pace.pass_s, device_s)
        found.append(ArmEstimate("edge", own.token_s(pace, device_s), usd, own.likely, own.asked, own.slowness))
    if shared is not None and shared.quality >= wish.quality:
        usd = prices.usd(shared.state_bytes, shared.asked * shared.work * pace.pass_s, device_s)
        found.append(ArmEstimate("handoff", device_s + shared.asked * (pace.rtt_s + pace.pass_s), usd))
    return found


def choose(offers: Sequence[ArmEstimate], wish: RoutingGoal, now: Arm | None) -> ArmPlan:
    """The fastest or the cheapest; the arm at work keeps its place unless another is clearly better."""
    best = min(offers, key=lambda offer: offer.cost(wish.objective))
    here = next((offer for offer in offers if offer.arm == now), best)
    if here.cost(wish.objective)[0] * MARGIN <= best.cost(wish.objective)[0]:
        best = here
    others = [offer for offer in offers if offer is not best]
    why = f"{wish.objective} at {wish.quality:g}: {told(best, others, wish.objective)}"
    return ArmPlan(best.arm, best.likely, why, best.asked, best.seconds / best.slowness)


def told(best: ArmEstimate, others: Sequence[ArmEstimate], objective: Objective) -> str:
    return " against ".join(
        f"{offer.arm} {1000 * offer.seconds:.0f} ms" + (f" {1e6 * offer.usd:.2f} µ$" if objective == "cheapest" else "")
        for offer in [best, *others]
    )
