"""Two real processes: the cloud service under test runs as an operator would start it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from edge_agent import EdgeAgent, EdgeConfig
from edge_agent.policy.breaker import BreakerLimits
from models.bundle import Bundle
from tests.bench.processes import CloudProcess

FAST_BREAKER = BreakerLimits(failures=3, first_s=0.1, last_s=0.5)


@pytest.fixture(scope="module")
def cloud(tiny_bundle: Bundle) -> Iterator[CloudProcess]:
    """One service for a module's tests; those that kill or stop one start their own."""
    with CloudProcess(tiny_bundle.folder, arguments=("--threads", "1")) as process:
        yield process


@pytest.fixture
def new_agent(tiny_bundle: Bundle) -> Iterator[Callable[..., EdgeAgent]]:
    """`new_agent(target, **settings)`; every agent is closed after the test."""
    opened: list[EdgeAgent] = []

    def build(target: str | None, **settings: Any) -> EdgeAgent:
        config = EdgeConfig(tiny_bundle.folder, target, threads=1, breaker=FAST_BREAKER, connect_s=10.0)
        opened.append(EdgeAgent(replace(config, **settings)))
        return opened[-1]

    yield build
    for agent in opened:
        agent.close()
