"""Which arm generates an answer's next tokens. Pure: estimates in, a plan out, which says why.

The dial is a promise with a number: the share of an answer's tokens that are what the cloud's model would choose.
`cloud` and `verify` keep any. The local model keeps it by remote queries for single tokens, those for which its
confidence head is below a threshold:

    seconds per token  =  local step  +  offload rate * (round trip + cloud step - what is decoded meanwhile)
    wrong tokens       =  those above the threshold that differ from the cloud's; calibration says how many

Source: token-level routing by the small model's uncertainty (CITER, Zheng et al., 2025; U-HLM, Oh et al., 2024), here
calibrated against the cloud model's own choice. Not by the prompt: neither it nor the first tokens of an answer predict
how often the local model is wrong in the rest (correlation below 0.2 on Spec-Bench).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from isthmus.edge_agent.policy.averages import Average
from isthmus.edge_agent.policy.prices import Objective, Prices
from isthmus.edge_agent.policy.speculation import Acceptance, LatencyModel
from isthmus.models.language.router.manifest import OffloadLevel

# auto: the router chooses, token by token; cascade: it does for whole answers
Arm = Literal["auto", "edge", "cloud", "verify", "handoff", "cascade"]
ARMS: tuple[Arm, ...] = ("auto", "edge", "cloud", "verify", "handoff", "cascade")

RECENT_TOKENS, PRIOR_TOKENS = 128, 32  # whose confidences give the offload rate; what the bundle's rate counts as
GUESS_RATE, PRIOR_GUESSES = 0.7, 16  # prior share of queries answered as the device guessed; what it counts as
SPAN_DECAY, PRIOR_S = 0.95, 0.3  # of latencies, with each span; seconds for which predictions count as right
FADING = 8  # one in so many of the recent confidences is forgotten with each answer
MARGIN = 0.9  # another arm must look this much better than the current one: a change costs a round trip
STREAM_BYTES = 2.0  # sent per token while the cloud decodes by itself: an opening, once per answer
ROUND_BYTES = 60.0  # of a round of drafts, or of a remote token query
TOKEN_BYTES = 3.0  # of a token of a prompt


@dataclass(frozen=True, slots=True)
class HandoffEstimate:
    """What layers shared by handoff are worth.

    quality: share of all tokens that are the model's choice. offload_rate: share that the cloud completes. work: share
    of a forward pass that one of those takes. state_bytes: of one token's hidden state.
    """

    quality: float
    offload_rate: float
    work: float
    state_bytes: float


@dataclass(frozen=True, slots=True)
class RoutingGoal:
    """What the owner wants. `quality`: the share of tokens that are the cloud model's choice."""

    quality: float
    objective: Objective = "fastest"
    prices: Prices = Prices()


@dataclass(frozen=True, slots=True)
class Reading:
    """What the cloud reads before it decides a token, which has a price: `unread` tokens of the text, once.

    token_s: of one. remaining: tokens of the answer that share it.
    """

    unread: int = 0
    token_s: float = 0.0
    remaining: float = 1.0

    def usd(self, prices: Prices, offload_rate: float) -> float:
        """Dollars a token where so many are the cloud's; the text of the device is read up to the last of them."""
        needed = 1 - math.pow(1 - offload_rate, self.remaining)
        unread = needed * self.unread / max(self.remaining, 1.0)
        read = unread + (needed * (1 - offload_rate) if offload_rate < 1 else 0.0)
        return prices.usd(read * TOKEN_BYTES, read * self.token_s, 0.0)


NOTHING_UNREAD = Reading()


@dataclass(frozen=True, slots=True)
class ArmEstimate:
    """An arm that keeps the quality, with the seconds and dollars of a token.

    For `edge`: the confidence `likely` below which the cloud is queried, the expected `offload_rate`, and `slowness` as
    in LocalEstimate.
    """

    arm: Arm
    seconds: float
    usd: float
    likely: float = 0.0
    offload_rate: float = 0.0
    slowness: float = 1.0

    def cost(self, objective: Objective) -> tuple[float, float]:
        """What to minimise, and what breaks ties."""
        return (self.seconds, self.usd) if objective == "fastest" else (self.usd, self.seconds)


@dataclass(frozen=True, slots=True)
class ArmPlan:
    """The arm for the next tokens. On `edge` the cloud is queried for tokens whose confidence is below `likely`.

    `offload_rate`: the expected share of these. `predicted_s`: predicted latency of a token, uncorrected. `early`:
    whether the cloud reads the prompt before there is a doubt. `begins`: confidence from which the device makes first
    tokens while the cloud does so, on another arm than `edge`; None: it leaves them to that arm.
    """

    arm: Arm
    likely: float
    why: str
    offload_rate: float = 0.0
    predicted_s: float = 0.0
    early: bool = False
    begins: float | None = None


@dataclass(frozen=True, slots=True)
class LocalEstimate:
    """The local model at a level: it queries the cloud for the share `offload_rate`, of confidence below `likely`.

    overhead_s: of a query, beyond round trip and step. guess_rate: share of queries answered as the device guessed.
    slowness: measured over predicted latency, of late.
    """

    likely: float
    offload_rate: float
    overhead_s: float = 0.0
    guess_rate: float = GUESS_RATE
    slowness: float = 1.0

    def token_s(self, latency: LatencyModel, device_s: float) -> float:
        """Latency of a token; `device_s` is that of a local step."""
        return self.slowness * (device_s + self.offload_rate * self.query_s(latency, device_s))

    def query_s(self, latency: LatencyModel, device_s: float) -> float:
        """Latency of a query, less what the device decodes after its guess meanwhile, which counts if that was right.

        It decodes until the next token of low confidence, or until the reply.
        """
        whole_s, sure = latency.rtt_s + latency.step_s + self.overhead_s, 1 - self.offload_rate
        if self.offload_rate <= 0 or device_s <= 0:
            return whole_s * (1 - self.guess_rate)
        run = sure * (1 - math.pow(sure, whole_s / device_s)) / self.offload_rate  # tokens decoded meanwhile
        return whole_s - self.guess_rate * min(run * device_s, whole_s)


class ConfidenceStats:
    """Recent confidences of the local model, and so the offload rate to expect: texts differ from one another."""

    def __init__(self, acceptance: Acceptance | None = None) -> None:
        """`acceptance`: of drafts, which are the same choices of the same model."""
        self._acceptance = acceptance or Acceptance()
        self._likely: deque[float] = deque(maxlen=RECENT_TOKENS)
        self._guesses: deque[bool] = deque(maxlen=RECENT_TOKENS)  # of queries: whether each was right
        self._overhead_s = Average(0.0)
        self._measured_s = self._predicted_s = 0.0  # of recent spans, decayed

    def observe(self, likely: float) -> None:
        """The confidence of one more token."""
        self._likely.append(likely)
        self._acceptance.expect(likely)

    def record_query(self, guessed: bool, overhead_s: float) -> None:
        """A query was answered, as the device had guessed or not, so much later than expected."""
        self._guesses.append(guessed)
        self._overhead_s.observe(overhead_s)

    def local_estimate(self, level: OffloadLevel) -> LocalEstimate:
        """The local model at a level, by what the bundle says and what was seen."""
        seen = sum(likely < level.likely for likely in self._likely)
        offload_rate = (PRIOR_TOKENS * level.asked + seen) / (PRIOR_TOKENS + len(self._likely))
        guess_rate = (PRIOR_GUESSES * GUESS_RATE + sum(self._guesses)) / (PRIOR_GUESSES + len(self._guesses))
        slowness = (PRIOR_S + self._measured_s) / (PRIOR_S + self._predicted_s)
        return LocalEstimate(level.likely, offload_rate, self._overhead_s.value, guess_rate, slowness)

    def record_latency(self, seconds: float, predicted_s: float) -> None:
        """What a span of tokens took, and what was predicted for it."""
        self._measured_s = SPAN_DECAY * self._measured_s + seconds
        self._predicted_s = SPAN_DECAY * self._predicted_s + predicted_s

    def fade(self) -> None:
        """Another answer begins: the oldest confidences fade, so that an arm that was given up is tried again."""
        for _ in range(-(-len(self._likely) // FADING)):
            self._likely.popleft()


def estimate_arms(
    goal: RoutingGoal,
    latency: LatencyModel,
    drafts: bool,
    device_s: float,
    local: LocalEstimate | None,
    handoff: HandoffEstimate | None,
    reading: Reading = NOTHING_UNREAD,
) -> list[ArmEstimate]:
    """Every arm that keeps the quality.

    drafts: whether the device can draft at present. device_s: of a local step. local, handoff: None when that arm does
    not keep the quality or cannot be used. reading: of the text, by the cloud.
    """
    prices = goal.prices
    read_usd = reading.usd(prices, 1.0)
    if drafts and not latency.prefers_streaming:
        seconds = latency.drafting_s
        rounds = 1 / latency.drafts + 1 - latency.acceptance  # per token, about: a round ends full, or at a wrong draft
        usd = prices.usd(rounds * ROUND_BYTES, rounds * latency.step_s, seconds) + rounds * prices.usd_per_token
        found = [ArmEstimate("verify", seconds, usd + read_usd)]
    else:
        usd = prices.usd(STREAM_BYTES, latency.step_s, 0.0) + prices.usd_per_token
        found = [ArmEstimate("cloud", latency.stream_s, usd + read_usd)]
    if local is not None:
        usd = prices.usd(local.offload_rate * ROUND_BYTES, local.offload_rate * latency.step_s, device_s)
        usd += local.offload_rate * prices.usd_per_token + reading.usd(prices, local.offload_rate)
        seconds = local.token_s(latency, device_s)
        found.append(ArmEstimate("edge", seconds, usd, local.likely, local.offload_rate, local.slowness))
    if handoff is not None and handoff.quality >= goal.quality:
        usd = prices.usd(handoff.state_bytes, handoff.offload_rate * handoff.work * latency.step_s, device_s)
        found.append(ArmEstimate("handoff", device_s + handoff.offload_rate * (latency.rtt_s + latency.step_s), usd))
    return found


def choose(estimates: Sequence[ArmEstimate], goal: RoutingGoal, now: Arm | None) -> ArmPlan:
    """The fastest or the cheapest; the current arm `now` stays unless another is clearly better."""
    best = min(estimates, key=lambda estimate: estimate.cost(goal.objective))
    current = next((estimate for estimate in estimates if estimate.arm == now), best)
    if current.cost(goal.objective)[0] * MARGIN <= best.cost(goal.objective)[0]:
        best = current
    others = [estimate for estimate in estimates if estimate is not best]
    described = " against ".join(describe(estimate, goal.objective) for estimate in [best, *others])
    why = f"{goal.objective} at {goal.quality:g}: {described}"
    early, predicted_s = goal.objective == "fastest", best.seconds / best.slowness
    begins = next((each.likely for each in estimates if each.arm == "edge"), None)
    if not early or best.arm not in ("cloud", "verify"):
        begins = None
    return ArmPlan(best.arm, best.likely, why, best.offload_rate, predicted_s, early, begins)


def describe(estimate: ArmEstimate, objective: Objective) -> str:
    """An estimate for a person."""
    price = f" {1e6 * estimate.usd:.2f} µ$" if objective == "cheapest" else ""
    return f"{estimate.arm} {1000 * estimate.seconds:.0f} ms{price}"
