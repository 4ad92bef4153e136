"""After a real fork an inherited agent says so at once; an agent that the child makes for itself works."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from PIL import Image

from isthmus.edge_agent import EdgeAgent
from isthmus.edge_agent.language.agent import LanguageAgent
from isthmus.models.errors import AgentClosed
from tests.bench.processes import CloudProcess
from tests.contract.conftest import LANGUAGE
from tests.contract.language_parts import language_agent

NewAgent = Callable[..., EdgeAgent]
WITHIN_S = 30.0


def forked(work: Callable[[], object]) -> object:
    """What `work` returns or raises in a forked child."""
    context = multiprocessing.get_context("fork")
    receiving, sending = context.Pipe(False)

    def child(connection: Connection) -> None:
        try:
            connection.send(work())
        except Exception as error:  # the parent looks at it
            connection.send(error)

    process = context.Process(target=child, args=(sending,))
    process.start()
    try:
        assert receiving.poll(WITHIN_S), "the child hangs"
        return receiving.recv()
    finally:
        process.kill()
        process.join()


def test_photos(cloud: CloudProcess, new_agent: NewAgent, photo: Image.Image) -> None:
    agent = new_agent(cloud.target, mode="split", min_agreement=0.0, deadline_s=10.0)
    assert agent.infer(photo).route == "split"
    error = forked(lambda: agent.infer(photo))
    assert isinstance(error, AgentClosed) and "before a fork, expected one that is made in each process" in str(error)
    assert forked(agent.close) is None

    def own() -> tuple[str, bool]:
        made = new_agent(cloud.target, mode="split", min_agreement=0.0, deadline_s=10.0)
        answers = [made.infer(photo) for _ in range(3)]
        return answers[-1].route, answers[-1].degraded

    assert forked(own) == ("split", False)
    assert agent.infer(photo).route == "split", "the parent goes on"


def test_a_device_without_a_cloud(new_agent: NewAgent, photo: Image.Image) -> None:
    agent = new_agent()
    assert isinstance(forked(lambda: agent.infer(photo)), AgentClosed)


@pytest.fixture(scope="module")
def language_cloud(endless_llama: Path) -> CloudProcess:
    return CloudProcess(arguments=("--model", str(endless_llama), *LANGUAGE))


def test_prompts(language_cloud: CloudProcess, endless_llama: Path) -> None:
    def answered(agent: LanguageAgent) -> tuple[int, bool]:
        answer = agent.answer("Hello?", max_tokens=5, arm="cloud")
        assert answer.summary is not None
        return answer.tokens, answer.summary.degraded

    with language_cloud as process, language_agent(endless_llama, process.target) as agent:
        assert answered(agent) == (5, False)
        error = forked(lambda: answered(agent))
        assert isinstance(error, AgentClosed) and "before a fork" in str(error)
        assert forked(agent.close) is None

        def own() -> tuple[int, bool]:
            with language_agent(endless_llama, process.target) as made:
                return answered(made)

        assert forked(own) == (5, False)
        assert answered(agent) == (5, False)
