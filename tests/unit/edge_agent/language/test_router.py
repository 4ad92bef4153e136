from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from isthmus.edge_agent.config import LanguageConfig
from isthmus.edge_agent.language.router import PRIOR_ACCEPTANCE, Router
from isthmus.edge_agent.policy.arms import HandoffEstimate
from isthmus.models.language.handoff.manifest import OffloadLevel
from tests.unit.edge_agent.language.scripted_cloud import declared

LEVELS = (OffloadLevel(likely=0.0, asked=0.0, wrong=0.1), OffloadLevel(likely=0.8, asked=0.1, wrong=0.01))
HANDOFF = HandoffEstimate(quality=0.96, offload_rate=0.4, work=1 / 3, state_bytes=250)


class Links(list[Any]):
    """Replicas whose links have one round trip."""

    model = declared(arms=("cloud", "verify", "handoff"))

    def best(self) -> Any:
        return self[0] if self else None


def links(rtt_s: float = 0.05) -> Any:
    return Links([SimpleNamespace(estimate=SimpleNamespace(rtt_s=rtt_s))])


def router(
    levels: tuple[OffloadLevel, ...] = LEVELS, handoff: HandoffEstimate | None = HANDOFF, **config: Any
) -> Router:
    made = Router(LanguageConfig(model="m", **config), levels, handoff, declared().fingerprint)
    made.local.draft_s.observe(0.01)
    return made


def test_the_request_may_ask_for_another_quality_than_the_owner() -> None:
    owner = router(quality=0.98, objective="cheapest")
    assert (owner.goal(None).quality, owner.goal(0.5).quality, owner.goal(None).objective) == (0.98, 0.5, "cheapest")


def test_drafts_are_first_believed_as_the_bundle_says() -> None:
    assert router().local.acceptance.overall == pytest.approx(0.9)
    assert router((), device_bits=4).local.acceptance.overall == PRIOR_ACCEPTANCE[4]


def test_the_source_of_drafts_that_is_configured_is_the_one_that_counts() -> None:
    model, lookup = router(), router(draft="lookup")
    assert model.drafts is model.local and lookup.drafts is lookup.lookup
    assert lookup.lookup.draft_s.value < model.local.draft_s.value


@pytest.mark.parametrize(
    ("quality", "usable", "offered"),
    [
        (0.0, True, {"edge", "verify", "handoff"}),
        (0.95, True, {"edge", "verify", "handoff"}),
        (0.97, True, {"edge", "verify"}),
        (1.0, True, {"verify"}),
        (0.5, False, {"cloud"}),
    ],
)
def test_only_arms_that_keep_the_quality_are_planned(quality: float, usable: bool, offered: set[str]) -> None:
    made = router()
    plan = made.plan(made.goal(quality), links(), usable, None)
    named = {arm for arm in ("edge", "cloud", "verify", "handoff") if f"{arm} " in plan.why.partition(": ")[2]}
    assert named == offered and plan.arm in offered


def test_without_levels_the_local_model_promises_nothing() -> None:
    made = router((), None)
    assert made.plan(made.goal(0.5), links(), True, None).arm in ("verify", "cloud")
    assert made.plan(made.goal(0.0), links(), True, None).arm == "edge"


def test_the_objective_decides() -> None:
    slow = {"quality": 0.95}
    fastest, cheapest = router(objective="fastest"), router(objective="cheapest")
    assert fastest.plan(fastest.goal(0.95), links(), True, None).why.startswith("fastest at 0.95")
    assert cheapest.plan(cheapest.goal(0.95), links(), True, None).arm == "edge", slow
