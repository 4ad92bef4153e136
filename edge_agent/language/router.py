"""Which arm is best now, by what an agent has learned: the shell around `policy.arms`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from isthmus.edge_agent.config import LanguageConfig
from isthmus.edge_agent.language.replicas import Replicas
from isthmus.edge_agent.language.router_bundles import RouterBundles
from isthmus.edge_agent.policy.arms import (
    Arm,
    ArmPlan,
    ConfidenceStats,
    HandoffEstimate,
    LocalEstimate,
    Reading,
    RoutingGoal,
    choose,
    estimate_arms,
)
from isthmus.edge_agent.policy.prices import Prices
from isthmus.edge_agent.policy.speculation import Acceptance, SpeculationStats
from isthmus.edge_agent.policy.whole_answers import AnswerCosts, AnswerPlan, plan_answer
from isthmus.models.language.router.bundle import RouterBundle
from isthmus.models.language.router.manifest import OffloadLevel, best_quality, level_for
from isthmus.models.messages import ModelInfo

NO_BUNDLES = RouterBundles()
ANSWER_TOKENS = 64.0  # of a typical answer, for what a round trip is beside it
PRIOR_ACCEPTANCE = {8: 0.95, 4: 0.75}  # of drafts by a local model with so many bits, until its own are known


class Router:
    """What is known of the local model, of drafts and of the cloud's speed, over many answers."""

    def __init__(
        self,
        config: LanguageConfig,
        bundles: RouterBundles = NO_BUNDLES,
        handoff: HandoffEstimate | None = None,
        weights: bytes = b"",
        prices: Prices | None = None,
    ) -> None:
        """`bundles`: with levels of the local model's confidence. `handoff` counts while the cloud holds the `weights`
        of this fingerprint, for which it was measured. `prices`: of the cost profile; None: those configured.
        """
        self._prices = prices or config.prices
        self._config, self.bundles, self._handoff, self._weights = config, bundles, handoff, weights
        levels = bundles.bundles[0].levels if bundles.bundles else ()
        prior = 1 - levels[0].wrong.value if levels else PRIOR_ACCEPTANCE[config.device_bits]
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
        return RoutingGoal(quality, self._config.objective, self._prices)

    def plan(
        self,
        goal: RoutingGoal,
        replicas: Replicas,
        usable: bool,
        now: Arm | None,
        *,
        bundle: RouterBundle | None = None,
        unread: int = 0,
        remaining: int = 1,
    ) -> ArmPlan:
        """The best arm for the next tokens. `usable`: the local model can continue; `now`: the current arm.

        `unread`: tokens of the text that the cloud does not hold; `remaining`: those that the answer may have.
        `bundle`: the one whose confidence head the answer uses; its levels count while the cloud's model is its own.
        """
        link, model = replicas.best() or next(iter(replicas)), replicas.model
        latency = self.drafts.latency(link.estimate.rtt_s)
        same = model is not None and model.fingerprint == self._weights
        drafts = (usable or self._config.draft == "lookup") and (model is None or "verify" in model.arms)
        paired = bundle if bundle is not None and model is not None and bundle.fits(model) else None
        local = self._local_estimate(goal, paired.levels if paired else ()) if usable else None
        handoff = self._handoff if usable and same and model is not None and "handoff" in model.arms else None
        reading = self._reading(unread, remaining)
        estimates = estimate_arms(goal, latency, drafts, self.local.draft_s.value, local, handoff, reading)
        plan = choose(estimates, goal, now)
        note = self._note(goal, model, paired) if usable and local is None else ""
        return replace(plan, why=f"{plan.why}; {note}") if note else plan

    def _note(self, goal: RoutingGoal, model: ModelInfo | None, bundle: RouterBundle | None) -> str:
        """Why the device decides no token by itself; empty where that was not asked for, or no cloud is known."""
        if model is None or goal.quality >= 1:
            return ""
        if bundle is None:
            return self.bundles.missing(model)
        return (
            f"router bundle {bundle.manifest.name} is certified up to quality {best_quality(bundle.levels) or 0.0:.4f}"
        )

    def plan_answer(
        self, goal: RoutingGoal, replicas: Replicas, bundle: RouterBundle, *, cloud_alone: bool, prompt: int = 0
    ) -> AnswerPlan:
        """Who gives a whole answer to a `prompt` of so many tokens.

        `cloud_alone`: whether that may be the cloud without asking the device.
        """
        link, levels = replicas.best() or next(iter(replicas)), bundle.manifest
        device_s, step_s, rtt_s = self.local.draft_s.value, self.local.step_s.value, link.estimate.rtt_s
        costs = AnswerCosts(ANSWER_TOKENS, device_s, step_s, rtt_s, self._reading(prompt, int(ANSWER_TOKENS)))
        return plan_answer(goal, levels.answer_levels, levels.query_levels, costs, cloud_alone=cloud_alone)

    def _reading(self, unread: int, remaining: int) -> Reading:
        """By what of late a token took to be read, whoever drafted."""
        return Reading(unread, self.local.reading_s, min(float(remaining), ANSWER_TOKENS))

    def _local_estimate(self, goal: RoutingGoal, levels: Sequence[OffloadLevel]) -> LocalEstimate | None:
        if goal.quality <= 0:
            return LocalEstimate(likely=0, offload_rate=0)
        level = level_for(levels, goal.quality) if goal.quality < 1 else None
        return self.confidence.local_estimate(level) if level else None
