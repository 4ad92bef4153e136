from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest

from isthmus.edge_agent.config import LanguageConfig
from isthmus.edge_agent.language.router import PRIOR_ACCEPTANCE, Router
from isthmus.edge_agent.language.router_bundles import RouterBundles
from isthmus.edge_agent.policy.arms import HandoffEstimate
from isthmus.models.language.router.bundle import RouterBundle
from isthmus.models.language.router.manifest import OffloadLevel
from isthmus.models.messages import ModelInfo
from tests.tiny_router import level
from tests.unit.edge_agent.language.scripted_cloud import declared

LEVELS = (level(0.0, 0.0, 0.1), level(0.8, 0.1, 0.01))
HANDOFF = HandoffEstimate(quality=0.96, offload_rate=0.4, work=1 / 3, state_bytes=250)


@dataclass(frozen=True)
class Bundle:
    """A router bundle for a cloud that holds the weights of `declared`."""

    levels: tuple[OffloadLevel, ...] = LEVELS

    @property
    def manifest(self) -> Any:
        return SimpleNamespace(name="mine", cloud=SimpleNamespace(name="big"))

    def fits(self, model: ModelInfo) -> bool:
        return model.fingerprint == declared().fingerprint


BUNDLE: RouterBundle = Bundle()  # type: ignore[assignment]


class Links(list[Any]):
    """Replicas whose links have one round trip."""

    model: ModelInfo | None = declared(arms=("cloud", "verify", "handoff"))

    def best(self) -> Any:
        return self[0] if self else None


def links(rtt_s: float = 0.05) -> Any:
    return Links([SimpleNamespace(estimate=SimpleNamespace(rtt_s=rtt_s))])


def router(
    bundles: tuple[RouterBundle, ...] = (BUNDLE,), handoff: HandoffEstimate | None = HANDOFF, **config: Any
) -> Router:
    made = Router(LanguageConfig(model="m", **config), RouterBundles(bundles), handoff, declared().fingerprint)
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
    plan = made.plan(made.goal(quality), links(), usable, None, bundle=BUNDLE)
    named = {arm for arm in ("edge", "cloud", "verify", "handoff") if f"{arm} " in plan.why.partition(": ")[2]}
    assert named == offered and plan.arm in offered


def test_without_levels_the_local_model_promises_nothing() -> None:
    made = router((), None)
    assert made.plan(made.goal(0.5), links(), True, None).arm in ("verify", "cloud")
    assert made.plan(made.goal(0.0), links(), True, None).arm == "edge"


def test_the_objective_decides() -> None:
    slow = {"quality": 0.95}
    fastest, cheapest = router(objective="fastest"), router(objective="cheapest")
    assert fastest.plan(fastest.goal(0.95), links(), True, None, bundle=BUNDLE).why.startswith("fastest at 0.95")
    assert cheapest.plan(cheapest.goal(0.95), links(), True, None, bundle=BUNDLE).arm == "edge", slow


def planned(quality: float, model: ModelInfo | None, bundle: RouterBundle | None, *bundles: RouterBundle) -> str:
    made, there = router(bundles, None), links()
    there.model = model
    return made.plan(made.goal(quality), there, True, None, bundle=bundle).why


OTHER = declared("other", fingerprint=b"another!".ljust(32))


@pytest.mark.parametrize(
    ("quality", "model", "bundle", "bundles", "words"),
    [
        (0.95, declared(), None, (), "; no router bundle is installed for the device's model"),
        (
            0.95,
            OTHER,
            None,
            (BUNDLE,),
            "; no router bundle is for other 616e6f746865 in the cloud: mine is for big",
        ),
        (0.95, OTHER, BUNDLE, (BUNDLE,), "; no router bundle is for other 616e6f746865 in the cloud: mine is for big"),
        (0.995, declared(), BUNDLE, (BUNDLE,), "; router bundle mine is certified up to quality 0.9900"),
    ],
)
def test_why_the_device_decides_nothing(
    quality: float, model: ModelInfo, bundle: RouterBundle | None, bundles: tuple[RouterBundle, ...], words: str
) -> None:
    why = planned(quality, model, bundle, *bundles)
    assert why.endswith(words) and "edge" not in why.partition(";")[0]


@pytest.mark.parametrize(("quality", "model"), [(1.0, declared()), (0.95, None), (0.0, declared())])
def test_nothing_is_missed_where_nothing_was_asked_for(quality: float, model: ModelInfo | None) -> None:
    assert ";" not in planned(quality, model, None)
