"""What photos take of the budgets, what keeps them on the device, how an agent explains itself; with a fake link."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from prometheus_client import CollectorRegistry

from isthmus.edge_agent import EdgeAgent, EdgeConfig
from isthmus.edge_agent.policy.budgets import UNLIMITED
from isthmus.edge_agent.policy.estimates import LinkEstimate
from isthmus.edge_agent.radio import Radio, probe_charge
from isthmus.edge_agent.spending import Budgets, OwnWeights
from isthmus.edge_agent.transport.exchanges import Exchange
from isthmus.edge_agent.vision.metrics import EdgeMetrics
from isthmus.edge_agent.vision.replicas import Replicas
from isthmus.models.errors import InvalidInput, LinkDown
from isthmus.models.messages import CloudReply
from isthmus.models.vision.bundle import Bundle
from tests.fake_link import AnyLink, Asked

PROBABILITIES = (np.float32([0.25, 0.75]), np.float32([0.1, 0.2, 0.7]))
DOWN_BYTES = 25


@dataclass
class FakeLink(AnyLink):
    """A cloud that answers in no time, or fails after a message was sent."""

    error: Exception | None = None
    estimate: LinkEstimate = LinkEstimate(0.001, 1e9)
    sizes: list[int] = field(default_factory=list)

    def answer(self, asked: Asked) -> Exchange:
        up_bytes = len(asked.payload.data) + 30
        asked.charge(up_bytes)
        asked.sent(up_bytes)
        self.sizes.append(up_bytes)
        if self.error is not None:
            raise self.error
        answer = CloudReply(tuple(tuple(map(float, PROBABILITIES[task])) for task in asked.tasks), 0.001, 0.002)
        return Exchange(answer, up_bytes, DOWN_BYTES, 0.02)


@dataclass
class Case:
    agent: EdgeAgent
    link: FakeLink
    registry: CollectorRegistry


@pytest.fixture
def new_case(tiny_bundle: Bundle, tmp_path: Path) -> Iterator[Callable[..., Case]]:
    opened: list[EdgeAgent] = []

    def build(mode: str = "auto", **settings: object) -> Case:
        registry, link = CollectorRegistry(), FakeLink()
        config = EdgeConfig(tiny_bundle.folder, threads=1, min_agreement=0.0, ledger=tmp_path / "ledger.db")
        agent = EdgeAgent(replace(config, **settings), EdgeMetrics(registry, tiny_bundle.manifest))  # type: ignore[arg-type]
        agent.replicas = Replicas([link])  # type: ignore[list-item]
        agent.config = replace(agent.config, mode=mode)  # type: ignore[arg-type]
        agent.exit_rule = replace(agent.exit_rule, confidences=(2.0, 2.0))  # every photo is hard
        opened.append(agent)
        return Case(agent, link, registry)

    yield build
    for agent in opened:
        agent.close()


@pytest.mark.parametrize("mode", ["auto", "offload", "edge"])
def test_a_private_photo_is_answered_by_the_exits_and_is_not_degraded(
    new_case: Callable[..., Case], photo: Image.Image, mode: str
) -> None:
    case = new_case(mode)
    answer = case.agent.infer(photo, private=True)
    assert (answer.route, answer.exit, answer.degraded, answer.bytes_up) == ("exit", "exit1", False, 0)
    assert case.link.sizes == []
    assert "private" in answer.why or mode != "auto"


def test_a_private_photo_lists_tasks_that_no_exit_answers(new_case: Callable[..., Case], photo: Image.Image) -> None:
    answer = new_case().agent.infer(photo, private=True, tasks=["colour", "defect"])
    assert (answer.missing, list(answer.answers)) == (("colour",), ["defect"])


def test_a_private_photo_cannot_be_sent_at_a_point(new_case: Callable[..., Case], photo: Image.Image) -> None:
    with pytest.raises(InvalidInput, match="private photos are not sent, but tap light, rate 1 was requested"):
        new_case().agent.infer(photo, private=True, tap="light", rate=1)


def test_an_answer_of_the_cloud_is_charged_what_it_took(new_case: Callable[..., Case], photo: Image.Image) -> None:
    case = new_case(mode="offload", budgets=Budgets(bytes_day=10_000_000, calls_hour=100))
    before = case.agent.ledger.allowance()
    answer = case.agent.infer(photo)
    after = case.agent.ledger.allowance()
    assert before.bytes - after.bytes == pytest.approx(case.link.sizes[0] + DOWN_BYTES, abs=5)
    assert before.calls - after.calls == pytest.approx(1, abs=0.1)
    assert case.agent.ledger.totals.spent.calls == 1
    assert answer.modelled_joules > 0 and answer.cost_usd > 0
    assert case.registry.get_sample_value("isthmus_edge_modelled_joules_total") == pytest.approx(answer.modelled_joules)


def test_without_budgets_nothing_is_written(new_case: Callable[..., Case], photo: Image.Image, tmp_path: Path) -> None:
    case = new_case(mode="offload")
    case.agent.infer(photo)
    assert case.agent.ledger.allowance() is UNLIMITED and not (tmp_path / "ledger.db").exists()


def test_a_message_without_a_reply_counts_with_all_that_was_reserved(
    new_case: Callable[..., Case], photo: Image.Image
) -> None:
    case = new_case(mode="offload", budgets=Budgets(bytes_day=10_000_000))
    case.link.error = LinkDown("the cable")
    before = case.agent.ledger.allowance().bytes
    assert case.agent.infer(photo).route == "fallback"
    assert before - case.agent.ledger.allowance().bytes > case.link.sizes[0] + DOWN_BYTES
    assert all(bucket.held == 0 for bucket in case.agent.ledger.buckets())


@pytest.mark.parametrize("mode", ["auto", "offload", "split"])
def test_an_exhausted_budget_degrades_the_answer_and_sends_nothing(
    new_case: Callable[..., Case], photo: Image.Image, mode: str
) -> None:
    case = new_case(mode=mode, budgets=Budgets(calls_hour=20))
    routes = [case.agent.infer(photo, explain=True).route for _ in range(4)]
    assert routes.count("fallback") == 2 and routes[-1] == "fallback" and len(case.link.sizes) == 2
    answer = case.agent.infer(photo)
    assert answer.degraded and "the budget of calls has" in answer.why
    degraded = case.registry.get_sample_value("isthmus_edge_degraded_responses_total", {"reason": "budget"})
    assert degraded == 3
    assert case.agent.metrics is not None
    case.agent.metrics.budgets(case.agent.ledger)
    left = case.registry.get_sample_value("isthmus_edge_budget_left_ratio", {"amount": "calls", "period": "hour"})
    assert left is not None and 0 <= left < 0.1


def test_an_agent_goes_on_where_the_last_one_ended(new_case: Callable[..., Case], photo: Image.Image) -> None:
    first = new_case(mode="offload", budgets=Budgets(calls_hour=20))
    assert [first.agent.infer(photo).route for _ in range(3)] == ["offload", "offload", "fallback"]
    second = new_case(mode="offload", budgets=Budgets(calls_hour=20))
    assert second.agent.infer(photo).route == "fallback" and second.link.sizes == []


def test_an_explained_answer_has_every_way_and_others_have_none(
    new_case: Callable[..., Case], photo: Image.Image
) -> None:
    agent = new_case().agent
    answer = agent.infer(photo, explain=True)
    assert answer.candidates is not None
    names = [each.name for each in answer.candidates]
    assert any(name.startswith("whole image") for name in names) and any("light" in name for name in names)
    assert sum(each.chosen for each in answer.candidates) == 1
    assert answer.as_dict()["candidates"][0].keys() >= {"name", "seconds", "usd", "joules", "right", "excluded"}
    plain = agent.infer(photo)
    assert plain.candidates is None and "candidates" not in plain.as_dict()


def test_probes_are_charged_to_the_same_budget_but_are_no_calls(new_case: Callable[..., Case]) -> None:
    agent = new_case(budgets=Budgets(bytes_day=100_000, calls_hour=20)).agent
    charge = probe_charge(agent.ledger, agent.profile, Radio())
    assert [charge(4000, 1.0) for _ in range(4)] == [True, True, False, False], "a tenth of the day's bytes at once"
    assert agent.ledger.totals.spent[::3] == (8000, 0)


def test_settings_become_a_goal(new_case: Callable[..., Case]) -> None:
    goal = new_case(objective="greenest", weights=OwnWeights(quality=7.0), target_s=0.25, target_share=0.9).agent.goal
    assert (goal.objective, goal.target_s, goal.target_share) == ("greenest", 0.25, 0.9)
    assert goal.weights is not None and (goal.weights.joules, goal.weights.quality) == (1.0, 7.0)


def test_a_profile_that_does_not_exist_is_refused_at_the_start(new_case: Callable[..., Case]) -> None:
    with pytest.raises(InvalidInput, match="profile 'wify' cannot be read"):
        new_case(profile="wify")
