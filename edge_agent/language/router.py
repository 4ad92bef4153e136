"""Which arm is best now, by what an agent has learned: the shell around `policy.arms`."""

from __future__ import annotations

from collections.abc import Sequence

from isthmus.edge_agent.config import LanguageConfig
from isthmus.edge_agent.language.replicas import Replicas
from isthmus.edge_agent.policy.arms import (
    Arm,
    ArmPlan,
    ConfidenceStats,
    HandoffEstimate,
    LocalEstimate,
    RoutingGoal,
    choose,
    estimate_arms,
    level_for,
)
from isthmus.edge_agent.policy.speculation import Acceptance, SpeculationStats
from isthmus.models.language.handoff.manifest import OffloadLevel

PRIOR_ACCEPTANCE = {8: 0.95, 4: 0.75}  # of drafts by a local model with so many bits, until its own are known


class Router:
    """What is known of the local model, of drafts and of the cloud's speed, over many answers."""

    def __init__(
        self,
        config: LanguageConfig,
        levels: Sequence[OffloadLevel] = (),
        handoff: HandoffEstimate | None = None,
        weights: bytes = b"",
    ) -> None:
        """`levels`: of the local model's confidence; none without a bundle that has them. Both count while the cloud
        holds the `weights` of this fingerprint, for which they were measured.
        """
        self._config, self._levels, self._handoff, self._weights = config, tuple(levels), handoff, weights
        prior = 1 - self._levels[0].wrong if self._levels else PRIOR_ACCEPTANCE[config.device_bits]
        self.local = SpeculationStats(acceptance=Acceptance(prior))  # of drafts by the local model
        self.lookup = SpeculationStats()  # of drafts by prompt lookup
        self.lookup.draft_s.observe(0.0)
        self.predictions = SpeculationStats()  # of drafts from predicted outputs
        self.predictions.draft_s.observe(0.0)
        self.confidence = ConfidenceStats(self.local.acceptance)

    @property
    def drafts(self) -> SpeculationStats:
        """Of the source of drafts that is configured."""
        return self.lookup if self._config.draft == "lookup" else self.local

    def goal(self, quality: float | None) -> RoutingGoal:
        """What a request asks for; None: the owner's quality."""
        quality = self._config.quality if quality is None else quality
        return RoutingGoal(quality, self._config.objective, self._config.prices)

    def plan(self, goal: RoutingGoal, replicas: Replicas, usable: bool, now: Arm | None) -> ArmPlan:
        """The best arm for the next tokens. `usable`: the local model can continue; `now`: the current arm."""
        link, model = replicas.best() or next(iter(replicas)), replicas.model
        latency = self.drafts.latency(link.estimate.rtt_s)
        same = model is not None and model.fingerprint == self._weights
        drafts = (usable or self._config.draft == "lookup") and (model is None or "verify" in model.arms)
        local = self._local_estimate(goal, self._levels if same else ()) if usable else None
        handoff = self._handoff if usable and same and model is not None and "handoff" in model.arms else None
        estimates = estimate_arms(goal, latency, drafts, self.local.draft_s.value, local, handoff)
        return choose(estimates, goal, now)

    def _local_estimate(self, goal: RoutingGoal, levels: Sequence[OffloadLevel]) -> LocalEstimate | None:
        if goal.quality <= 0:
            return LocalEstimate(likely=0, offload_rate=0)
        level = level_for(levels, goal.quality) if goal.quality < 1 else None
        return self.confidence.local_estimate(level) if level else None
