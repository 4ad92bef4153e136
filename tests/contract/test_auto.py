"""Several arms in one answer, between two real processes: who makes which token, and what faults may not change."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from isthmus.edge_agent.language.agent import LanguageAgent
from isthmus.edge_agent.language.request import GenerationRequest, Summary, Token
from isthmus.models.language.checkpoint.checkpoint import Checkpoint
from tests.bench.processes import CloudProcess, EdgeProcess
from tests.contract.conftest import LANGUAGE
from tests.contract.language_parts import Answer, language_agent, prompt_of, started
from tests.tiny_router import write_tiny_router

TOKENS, STORY = 40, "Tell me a long story."
HALF = 0.9  # the quality that the tiny bundle's judge keeps by asking for about half of the tokens


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, endless_llama: Path) -> Path:
    return write_tiny_router(tmp_path_factory.mktemp("routers") / "tiny", Checkpoint.open(endless_llama))


@pytest.fixture(scope="module")
def cloud(endless_llama: Path) -> Iterator[CloudProcess]:
    with CloudProcess(arguments=("--model", str(endless_llama), *LANGUAGE)) as process:
        yield process


@pytest.fixture
def serving(cloud: CloudProcess) -> CloudProcess:
    return started(cloud)


@pytest.fixture
def agent(serving: CloudProcess, endless_llama: Path, bundle: Path) -> Iterator[LanguageAgent]:
    """One that asks for single tokens as long as quality allows that, whatever the machine is busy with."""
    with language_agent(endless_llama, serving.target, router=bundle, device_bits=8, objective="cheapest") as made:
        yield made


def answered(agent: LanguageAgent, quality: float, meanwhile: Callable[[int], None] = lambda made: None) -> Answer:
    return Answer(agent, prompt_of(agent, STORY), TOKENS, "auto", meanwhile=meanwhile, quality=quality)


def test_the_dial_goes_from_the_device_to_the_cloud(agent: LanguageAgent) -> None:
    cheap, half, best = (answered(agent, quality) for quality in (0.0, HALF, 1.0))
    assert {token.source for token in cheap.tokens} == {"edge"} and cheap.how.bytes_up == 0
    sources = [token.source for token in half.tokens]
    assert set(sources) == {"edge", "cloud"} and half.how.rounds == half.how.passes == sources.count("cloud")
    assert 0 < half.how.bytes_up < 4000
    exact = Answer(agent, prompt_of(agent, STORY), TOKENS, "cloud")
    assert best.ids == exact.ids and "edge" not in {token.source for token in best.tokens}


def test_spans_are_the_tokens(agent: LanguageAgent) -> None:
    answer = answered(agent, HALF)
    arms = [span.arm for span in answer.how.spans for _ in range(span.tokens)]
    assert arms == [token.source for token in answer.tokens]
    assert all("sure" in span.why for span in answer.how.spans if span.arm == "cloud")
    assert all("at 0.9: edge" in span.why for span in answer.how.spans if span.arm == "edge")


def test_each_token_is_what_its_maker_says_behind_the_text(agent: LanguageAgent) -> None:
    prompt, answer = prompt_of(agent, STORY), answered(agent, HALF)
    for place in (0, 7, 20, 39):
        token = answer.tokens[place]
        arm = "edge" if token.source == "edge" else "cloud"
        assert Answer(agent, (*prompt, *answer.ids[:place]), 1, arm).ids == [token.id]


def test_a_killed_cloud_changes_no_token(serving: CloudProcess, endless_llama: Path, bundle: Path) -> None:
    def restart(made: int) -> None:
        if made == 15:
            serving.kill()
            serving.start(wait=False)

    settings = {"router": bundle, "device_bits": 8, "objective": "cheapest", "on_loss": "wait"}
    with language_agent(endless_llama, serving.target, **settings) as agent:
        for quality in (HALF, 1.0):
            expected, answer = answered(agent, quality).ids, answered(agent, quality, restart)
            assert answer.ids == expected and not answer.how.degraded and "went on" in answer.how.why


def test_without_the_cloud_the_device_goes_on_and_comes_back(agent: LanguageAgent, serving: CloudProcess) -> None:
    def kill(made: int) -> None:
        if made == 15:
            serving.kill()

    expected, answer = answered(agent, HALF).ids, answered(agent, HALF, kill)
    assert answer.ids[:15] == expected[:15] and len(answer.ids) == TOKENS
    assert answer.how.degraded and {token.source for token in answer.tokens[17:]} == {"edge"}
    serving.start()
    agent.replicas.wait(threading.Event())
    assert not answered(agent, HALF).how.degraded


def test_evicted_in_the_middle_it_brings_everything_again(endless_llama: Path, bundle: Path) -> None:
    arguments = ("--model", str(endless_llama), "--context-mb", "1", *LANGUAGE)
    settings = {"router": bundle, "device_bits": 8, "objective": "cheapest"}
    with (
        CloudProcess(arguments=arguments) as cloud,
        language_agent(endless_llama, cloud.target, **settings) as one,
        language_agent(endless_llama, cloud.target, **settings) as other,
    ):
        expected = answered(one, HALF).ids
        events = answered(one, HALF, lambda made: None if made % 10 else drain(other))
        assert events.ids == expected and not events.how.degraded


def drain(agent: LanguageAgent) -> None:
    Answer(agent, prompt_of(agent, "Something else, and long enough to count."), TOKENS, "cloud")


def test_while_another_answer_uses_the_device_this_one_does_too(agent: LanguageAgent) -> None:
    expected = answered(agent, HALF).ids
    first = agent.generate(GenerationRequest(prompt_of(agent, STORY), TOKENS, "edge"))
    next(first)
    answer = answered(agent, HALF)
    first.close()  # type: ignore[attr-defined]
    assert {token.source for token in answer.tokens} == {"edge", "cloud"} and answer.ids == expected


def test_given_up_it_leaves_device_and_cloud_to_others(agent: LanguageAgent) -> None:
    for quality in (HALF, 1.0):
        events = agent.generate(GenerationRequest(prompt_of(agent, STORY), TOKENS, "auto", quality=quality))
        assert isinstance(next(events), Token) and isinstance(next(events), Token)
        events.close()  # type: ignore[attr-defined]
        *_, summary = agent.generate(GenerationRequest(prompt_of(agent, STORY), 3, "verify"))
        assert isinstance(summary, Summary) and summary.tokens == 3


def test_by_http_the_answer_says_who_made_what(serving: CloudProcess, endless_llama: Path, bundle: Path) -> None:
    own = ("--model", str(endless_llama), "--router", str(bundle), "--objective", "cheapest", "--threads", "1")
    with EdgeProcess(*own, "--cloud", serving.target) as edge:
        body = {"model": "auto-q0.9", "prompt": STORY, "max_tokens": 30, "temperature": 0}
        answer = httpx.post(f"{edge.url}/v1/completions", json=body, timeout=60).json()
        assert answer["isthmus"]["arm"] == "auto"
        spans = answer["isthmus"]["spans"]
        assert {span["arm"] for span in spans} == {"edge", "cloud"}
        assert sum(span["tokens"] for span in spans) == answer["usage"]["completion_tokens"] == 30
        private = httpx.post(f"{edge.url}/v1/completions", json={**body, "private": True}, timeout=60).json()
        assert (private["isthmus"]["arm"], private["isthmus"]["bytes_up"]) == ("edge", 0)
