"""Two real processes: the cloud service under test runs as an operator would start it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.numpy

from isthmus.edge_agent import EdgeAgent, EdgeConfig
from isthmus.edge_agent.policy.breaker import BreakerLimits
from isthmus.models.language.checkpoint.huggingface import WEIGHTS
from isthmus.models.vision.bundle import Bundle
from tests.bench.processes import CloudProcess
from tests.bench.tiny_llama import write_tiny_llama

LANGUAGE = ("--dtype", "float32", "--threads", "1")
FAST_BREAKER = BreakerLimits(failures=3, first_s=0.1, last_s=0.5)


@pytest.fixture(scope="module")
def cloud(tiny_bundle: Bundle) -> Iterator[CloudProcess]:
    """One service for a module's tests; those that kill or stop one start their own."""
    with CloudProcess(tiny_bundle.folder, arguments=("--threads", "1")) as process:
        yield process


@pytest.fixture
def new_agent(tiny_bundle: Bundle) -> Iterator[Callable[..., EdgeAgent]]:
    """`new_agent(*targets, **settings)`; every agent is closed after the test."""
    opened: list[EdgeAgent] = []

    def build(*targets: str, **settings: Any) -> EdgeAgent:
        config = EdgeConfig(tiny_bundle.folder, targets, threads=1, breaker=FAST_BREAKER, connect_s=10.0)
        opened.append(EdgeAgent(replace(config, **settings)))
        return opened[-1]

    yield build
    for agent in opened:
        agent.close()


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random language model of 259 bytes and marks, with a context of 512 tokens. Read only."""
    return write_tiny_llama(tmp_path_factory.mktemp("language") / "tiny")


@pytest.fixture(scope="session")
def endless_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another one that hardly ever ends its answers: the marks of an end have logit 0, the best token about 5."""
    folder = write_tiny_llama(tmp_path_factory.mktemp("language") / "endless", seed=1)
    tensors = safetensors.numpy.load_file(folder / WEIGHTS)
    tensors["model.embed_tokens.weight"][[0, 2]] = 0
    safetensors.numpy.save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    return folder
