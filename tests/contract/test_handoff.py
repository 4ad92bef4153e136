"""Layers shared between two real processes: who decides which token, what crosses, and what faults may not change."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from isthmus.edge_agent.language.agent import LanguageAgent
from isthmus.models.errors import InvalidInput
from isthmus.models.language.checkpoint.checkpoint import Checkpoint
from isthmus.models.language.torch.kv_fill import EXACT_FIRST, exact_last
from tests.bench.processes import CloudProcess
from tests.contract.conftest import LANGUAGE
from tests.contract.language_parts import CHATTER, Answer, language_agent, prompt_of, started
from tests.tiny_handoff import write_tiny_handoff

TOKENS = 40
BOTH, CLOUD = 0.9, 1.0  # agreements asked for: of the tiny bundle's threshold, and one that no exit has


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, endless_llama: Path) -> Path:
    return write_tiny_handoff(tmp_path_factory.mktemp("handoffs") / "tiny", Checkpoint.open(endless_llama))


@pytest.fixture(scope="module")
def cloud(endless_llama: Path, bundle: Path) -> Iterator[CloudProcess]:
    arguments = ("--model", str(endless_llama), "--handoff", str(bundle), *LANGUAGE)
    with CloudProcess(arguments=arguments) as process:
        yield process


@pytest.fixture
def serving(cloud: CloudProcess) -> CloudProcess:
    return started(cloud)


def agent_of(
    cloud: CloudProcess, model: Path, bundle: Path, agreement: float = BOTH, **settings: object
) -> LanguageAgent:
    return language_agent(model, cloud.target, handoff=bundle, agreement=agreement, device_bits=8, **settings)


def answered(agent: LanguageAgent, meanwhile: Callable[[int], None] = lambda made: None) -> Answer:
    return Answer(agent, prompt_of(agent, "Tell me a long story."), TOKENS, "handoff", CHATTER, meanwhile)


@pytest.mark.parametrize("fill", [False, True])
def test_exits_decide_what_they_are_sure_of_and_the_cloud_the_rest(
    serving: CloudProcess, endless_llama: Path, bundle: Path, fill: bool
) -> None:
    before = serving.metric("state_positions_total", kind="filled")
    with agent_of(serving, endless_llama, bundle, fill=fill) as agent:
        assert agent.arms() == ("auto", "edge", "cloud", "verify", "handoff")
        answer = answered(agent)
    assert (serving.metric("state_positions_total", kind="filled") > before) == fill
    sources = [token.source for token in answer.tokens]
    assert set(sources) == {"edge", "cloud"} and len(sources) == TOKENS
    assert answer.how.arm == "handoff" and not answer.how.degraded
    assert answer.how.rounds == answer.how.passes == sources.count("cloud")
    assert 0 < answer.how.bytes_up < TOKENS * 160


def test_a_prompt_may_skip_the_last_layers(serving: CloudProcess, endless_llama: Path, bundle: Path) -> None:
    """Both arms read it the same way; a service without a bundle, or other layers, are refused in one line."""
    before = serving.metric("state_positions_total", kind="filled")
    with agent_of(serving, endless_llama, bundle, prefill_layers=1) as agent:
        prompt = prompt_of(agent, "Tell me a long story. " * 12)
        cloud, verify = (Answer(agent, prompt, TOKENS, arm, CHATTER) for arm in ("cloud", "verify"))
    assert verify.ids == cloud.ids and not cloud.how.degraded
    filled = serving.metric("state_positions_total", kind="filled") - before
    assert filled >= len(prompt) - EXACT_FIRST - exact_last(len(prompt))
    refused = pytest.raises(InvalidInput, match="2 layers of a prompt, expected 1 to 1, or 0 for all")
    with agent_of(serving, endless_llama, bundle, prefill_layers=2) as agent, refused:
        Answer(agent, prompt, TOKENS, "cloud", CHATTER)


def test_an_agreement_that_no_exit_has_leaves_all_to_the_cloud(
    serving: CloudProcess, endless_llama: Path, bundle: Path
) -> None:
    with agent_of(serving, endless_llama, bundle, CLOUD, state_point=1) as agent:
        answer = answered(agent)
        whole = Answer(agent, prompt_of(agent, "Tell me a long story."), TOKENS, "cloud", CHATTER)
    assert {token.source for token in answer.tokens} == {"cloud"}
    assert answer.ids[:5] == whole.ids[:5], "rows in 8 bits, coded, through the cloud's own layers"


def test_a_killed_cloud_changes_no_token(serving: CloudProcess, endless_llama: Path, bundle: Path) -> None:
    """Rows that decided a token cross again as they did, beside others of another rate."""

    def restart(made: int) -> None:
        if made == 15:
            serving.kill()
            serving.start(wait=False)

    with agent_of(serving, endless_llama, bundle, state_point=1, on_loss="wait") as agent:
        expected, answer = answered(agent).ids, answered(agent, restart)
    assert answer.ids == expected and not answer.how.degraded and "went on" in answer.how.why


def test_without_the_cloud_the_device_goes_on_through_all_layers(
    serving: CloudProcess, endless_llama: Path, bundle: Path
) -> None:
    def kill(made: int) -> None:
        if made == 15:
            serving.kill()

    with agent_of(serving, endless_llama, bundle) as agent:
        expected, answer = answered(agent).ids, answered(agent, kill)
        assert answer.ids[:15] == expected[:15] and len(answer.ids) == TOKENS
        assert answer.how.degraded and {token.source for token in answer.tokens[17:]} == {"edge"}
        prompt = (*prompt_of(agent, "Tell me a long story."), *answer.ids[:20])
        assert answer.ids[20:] == Answer(agent, prompt, TOKENS - 20, "edge", CHATTER).ids
        serving.start()
        link = agent.replicas.best() or agent.replicas.wait(threading.Event())
        assert link.target == serving.target and not answered(agent).how.degraded


def test_the_next_turn_brings_only_what_is_new(serving: CloudProcess, endless_llama: Path, bundle: Path) -> None:
    with agent_of(serving, endless_llama, bundle, CLOUD) as agent:
        first = answered(agent)
        prompt = (*prompt_of(agent, "Tell me a long story."), *first.ids, *prompt_of(agent, " And then?"))
        second = Answer(agent, prompt, 5, "handoff")
    assert second.how.cached >= len(prompt) - 15 and second.how.bytes_up < first.how.bytes_up


def test_evicted_in_the_middle_it_brings_everything_again(endless_llama: Path, bundle: Path) -> None:
    """A budget for one session, and two that take turns."""
    arguments = ("--model", str(endless_llama), "--handoff", str(bundle), "--context-mb", "1", *LANGUAGE)
    with (
        CloudProcess(arguments=arguments) as cloud,
        agent_of(cloud, endless_llama, bundle, CLOUD, state_point=1) as one,
        agent_of(cloud, endless_llama, bundle, CLOUD) as other,
    ):
        expected = answered(one).ids
        events = answered(one, lambda made: None if made % 10 else drain(other))
        assert events.ids == expected and not events.how.degraded


def drain(agent: LanguageAgent) -> None:
    answered(agent)


def test_a_cloud_without_the_bundle_is_left_alone_and_the_answer_says_why(endless_llama: Path, bundle: Path) -> None:
    """The cloud is at fault, not the request: the device goes on through all layers."""
    with (
        CloudProcess(arguments=("--model", str(endless_llama), *LANGUAGE)) as cloud,
        agent_of(cloud, endless_llama, bundle, CLOUD) as agent,
    ):
        answer = answered(agent)
        expected = Answer(agent, prompt_of(agent, "Tell me a long story."), TOKENS, "edge", CHATTER)
    assert answer.ids == expected.ids and answer.how.degraded
    assert "handoff" in answer.how.why and "is not held here" in answer.how.why
