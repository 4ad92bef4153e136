"""Prompts of real agents on one ledger: bytes counted on the wire, and what happens when a budget is used up."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from isthmus.edge_agent import LanguageAgent, LanguageConfig
from isthmus.edge_agent.language.request import Summary
from isthmus.edge_agent.policy.arms import Arm
from isthmus.edge_agent.spending import Budgets
from isthmus.models.errors import OverBudget
from isthmus.models.messages import Sampling
from tests.bench.processes import CloudProcess
from tests.bench.proxy import LinkProxy, LinkSpec
from tests.contract.conftest import LANGUAGE

CONNECTION_BYTES = 40_000  # of both agents: HTTP/2's set-up, Describe, probes, and the tokenizer of the tiny model
MESSAGE_BYTES = 400  # of HTTP/2 around a message: headers, windows, pings


@pytest.fixture(scope="module")
def cloud(endless_llama: Path) -> Iterator[CloudProcess]:
    with CloudProcess(arguments=("--model", str(endless_llama), *LANGUAGE)) as process:
        yield process


def answer(agent: LanguageAgent, arm: Arm, tokens: int = 20) -> Summary:
    summary = agent.answer("Hello there", arm=arm, max_tokens=tokens, sampling=Sampling(0.8, 1.0, 3)).summary
    assert summary is not None
    return summary


@pytest.mark.parametrize(("arm", "limit"), [("cloud", 100_000.0), ("verify", 200_000.0)])
def test_the_device_goes_on_when_the_budget_of_bytes_is_used_up(
    cloud: CloudProcess, endless_llama: Path, tmp_path: Path, arm: Arm, limit: float
) -> None:
    with LinkProxy(cloud.port, LinkSpec(rate_bps=None, rtt_s=0.0)) as proxy:
        config = LanguageConfig(
            str(endless_llama), (f"127.0.0.1:{proxy.port}",), threads=1, budgets=Budgets(bytes_hour=limit),
            ledger=tmp_path / "ledger.db",
        )  # fmt: skip
        with LanguageAgent(config) as agent:
            answers = [answer(agent, arm) for _ in range(25)]
        free = LanguageConfig(str(endless_llama), threads=1)
        with LanguageAgent(free) as alone:
            assert answer(alone, "edge").tokens == 20
        moved = proxy.up.bytes + proxy.down.bytes
    assert {each.tokens for each in answers} == {20}, "every answer is whole"
    assert not answers[0].degraded
    assert answers[-1].degraded and "the budget of bytes has" in answers[-1].why
    messages = sum(each.bytes_up + each.bytes_down for each in answers)
    assert messages <= limit / 10 * 1.05
    assert moved <= messages + CONNECTION_BYTES + MESSAGE_BYTES * sum(each.rounds + 2 for each in answers)


def test_without_a_model_on_the_device_the_answer_fails_and_agents_share_the_ledger(
    cloud: CloudProcess, tmp_path: Path
) -> None:
    config = LanguageConfig(
        None, (f"127.0.0.1:{cloud.port}",), budgets=Budgets(calls_hour=30), ledger=tmp_path / "ledger.db"
    )
    for allowed in (2, 1):
        with LanguageAgent(config) as agent:
            for _ in range(allowed):
                assert not answer(agent, "cloud").degraded
    with LanguageAgent(config) as agent, pytest.raises(OverBudget, match="the budget of calls has"):
        answer(agent, "cloud")
