"""What the contracts of language share: a bench over one link, asking an agent, watching a cloud's memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from isthmus.edge_agent.config import LanguageConfig
from isthmus.edge_agent.language.agent import LanguageAgent
from isthmus.edge_agent.language.request import GenerationRequest, Summary, Token
from isthmus.edge_agent.policy.arms import Arm
from isthmus.models.messages import GREEDY, Sampling
from tests.bench.processes import CloudProcess

CHATTER = Sampling(0.8, seed=7)  # its noise depends on the position, so a token lost or doubled changes all that follow


def language_agent(model: Path | None, *clouds: str, **settings: Any) -> LanguageAgent:
    settings = {"threads": 1, "connect_s": 10.0, "device_bits": 4, **settings}
    return LanguageAgent(LanguageConfig(None if model is None else str(model), clouds, **settings))


def started(cloud: CloudProcess) -> CloudProcess:
    """It serves, whatever the test before did to it."""
    if cloud.process is None or cloud.process.poll() is not None:
        cloud.start()
    return cloud


def prompt_of(agent: LanguageAgent, text: str) -> tuple[int, ...]:
    return tuple(agent.tokenizer.encode(text))


class Answer:
    """An answer with its summary."""

    def __init__(
        self,
        agent: LanguageAgent,
        prompt: Sequence[int],
        tokens: int,
        arm: Arm = "verify",
        sampling: Sampling = GREEDY,
        meanwhile: Callable[[int], None] = lambda made: None,
        quality: float | None = None,
    ) -> None:
        """`meanwhile` is called after each token with their number."""
        self.tokens: list[Token] = []
        self.summary: Summary | None = None
        for event in agent.generate(GenerationRequest(tuple(prompt), tokens, arm, sampling, quality=quality)):
            assert self.summary is None, "a summary is the last event"
            if isinstance(event, Summary):
                self.summary = event
                continue
            self.tokens.append(event)
            meanwhile(len(self.tokens))

    @property
    def ids(self) -> list[int]:
        return [token.id for token in self.tokens]

    @property
    def how(self) -> Summary:
        assert self.summary is not None
        return self.summary


def until(condition: Callable[[], bool], within_s: float = 20.0) -> None:
    deadline_s = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline_s, "it did not come to pass"
        time.sleep(0.02)
