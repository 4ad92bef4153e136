"""What is promised when a cloud dies, drains or falls silent in mid-answer: the text goes on, none lost or doubled."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from isthmus.edge_agent.language.agent import LanguageAgent
from isthmus.edge_agent.policy.arms import Arm
from isthmus.edge_agent.transport.cloud_link import CloudLink
from tests.bench.processes import CloudProcess
from tests.bench.proxy import LinkProxy, LinkSpec
from tests.contract.conftest import LANGUAGE
from tests.contract.language_parts import CHATTER, Answer, language_agent, prompt_of, until

TOKENS, STRIKE = 90, 20  # of an answer; after so many something happens
SLOWDOWN = 6  # a pass takes about 6 ms, so that the end of an answer is not under way before something happens

Clouds = tuple[CloudProcess, CloudProcess]
Expected = tuple[tuple[int, ...], list[int]]  # a prompt, and its answer when nothing happens


@pytest.fixture(scope="module")
def processes(endless_llama: Path) -> Iterator[Clouds]:
    """Two slow clouds."""
    arguments = ("--model", str(endless_llama), *LANGUAGE)
    one, two = (CloudProcess(arguments=arguments, module="tests.bench.slow_cloud") for _ in range(2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ISTHMUS_BENCH_SLOWDOWN", str(SLOWDOWN))
        try:
            yield one, two
        finally:
            for process in (one, two):
                process.__exit__()


def serving(processes: Clouds) -> None:
    for process in processes:
        if process.process is None or process.process.poll() is not None:
            process.start(wait=False)
    for process in processes:
        process.wait_serving()


@pytest.fixture
def clouds(processes: Clouds) -> Clouds:
    """Both serve, whatever the test before did to them."""
    serving(processes)
    return processes


@pytest.fixture(scope="module")
def expected(processes: Clouds, endless_llama: Path) -> Expected:
    serving(processes)
    with language_agent(endless_llama, processes[1].target) as agent:
        prompt = prompt_of(agent, "Tell me a long story.")
        answer = Answer(agent, prompt, TOKENS, "cloud", CHATTER)
    assert len(answer.ids) == TOKENS, "the model was to write until it is stopped"
    return prompt, answer.ids


@pytest.fixture
def unanswered(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The replicas that did not answer when the agent asked whether they are alive, each a wait of its own."""
    found: list[str] = []
    alive = CloudLink.alive

    def watched(link: CloudLink, timeout_s: float) -> bool:
        answered = alive(link, timeout_s)
        found.extend([] if answered else [link.target])
        return answered

    monkeypatch.setattr(CloudLink, "alive", watched)
    return found


def at_token(strike: Callable[[], object], number: int = STRIKE) -> Callable[[int], None]:
    """Calls `strike` once, behind that token."""

    def meanwhile(made: int) -> None:
        if made == number:
            strike()

    return meanwhile


@pytest.mark.parametrize("arm", ["cloud", "verify"])
def test_killed_and_started_again(clouds: Clouds, endless_llama: Path, expected: Expected, arm: Arm) -> None:
    """SIGKILL, nobody else to ask: the agent waits, opens the session again with what it has, and misses nothing."""
    prompt, ids = expected

    def restart() -> None:
        clouds[0].kill()
        clouds[0].start(wait=False)

    with language_agent(endless_llama, clouds[0].target, on_loss="wait") as agent:
        answer = Answer(agent, prompt, TOKENS, arm, CHATTER, at_token(restart))
    assert answer.ids == ids
    assert "went on" in answer.how.why and not answer.how.degraded
    assert {token.source for token in answer.tokens} <= {"cloud", "draft"}


def test_killed_and_on_alone(clouds: Clouds, endless_llama: Path, expected: Expected, unanswered: list[str]) -> None:
    prompt, ids = expected
    with language_agent(endless_llama, clouds[0].target, on_loss="alone") as agent:
        answer = Answer(agent, prompt, TOKENS, "verify", CHATTER, at_token(clouds[0].kill))
    assert len(answer.ids) == TOKENS
    assert answer.how.degraded and not unanswered, "a broken stream is noticed at once"
    alone = [token.source for token in answer.tokens].index("edge")
    assert STRIKE <= alone < TOKENS and answer.ids[:alone] == ids[:alone]
    assert {token.source for token in answer.tokens[alone:]} == {"edge"}


def went_on(agent: LanguageAgent, answer: Answer, ids: list[int], second: CloudProcess, before: float) -> None:
    """The second replica took over, soon: the same tokens, of which it decided the rest."""
    assert answer.ids == ids
    assert not answer.how.degraded
    assert {token.source for token in answer.tokens} <= {"cloud", "draft"}
    assert 0 < second.metric("tokens_committed_total") - before < TOKENS
    best = agent.replicas.best()
    assert best is not None and best.target == second.target, "who failed stands behind the others"


def test_killed_with_a_second_replica(
    clouds: Clouds, endless_llama: Path, expected: Expected, unanswered: list[str]
) -> None:
    prompt, ids = expected
    before = clouds[1].metric("tokens_committed_total")
    with language_agent(endless_llama, clouds[0].target, clouds[1].target) as agent:
        answer = Answer(agent, prompt, TOKENS, "verify", CHATTER, at_token(clouds[0].kill))
        went_on(agent, answer, ids, clouds[1], before)
    assert not unanswered, "a broken stream is noticed at once"


def test_sigterm_in_mid_answer(clouds: Clouds, endless_llama: Path, expected: Expected, unanswered: list[str]) -> None:
    """The service says goodbye, the device takes its tokens elsewhere, and the process ends in order."""
    prompt, ids = expected
    before, said = clouds[1].metric("tokens_committed_total"), clouds[0].read_log().count("drained")
    assert clouds[0].process is not None
    with language_agent(endless_llama, clouds[0].target, clouds[1].target) as agent:
        answer = Answer(agent, prompt, TOKENS, "verify", CHATTER, at_token(clouds[0].process.terminate))
        went_on(agent, answer, ids, clouds[1], before)
    assert not unanswered, "a goodbye is noticed at once"
    assert clouds[0].process.wait(10) == 0
    assert clouds[0].read_log().count("drained") == said + 1


Lose = Callable[[LinkProxy], None]


def cut(proxy: LinkProxy) -> None:
    """Connections break, and new ones lead nowhere."""
    proxy.black_hole(True)
    proxy.cut()


def pull(proxy: LinkProxy) -> None:
    """Nothing breaks, and nothing comes through any more."""
    proxy.black_hole(True)
    proxy.silence(True)


@pytest.mark.parametrize(("lose", "arm", "looks"), [(cut, "verify", 0), (pull, "verify", 1), (pull, "cloud", 1)])
def test_a_link_that_swallows_everything(
    clouds: Clouds,
    endless_llama: Path,
    expected: Expected,
    unanswered: list[str],
    lose: Lose,
    arm: Arm,
    looks: int,
) -> None:
    """One look that nobody answers is enough to go elsewhere."""
    prompt, ids = expected
    before = clouds[1].metric("tokens_committed_total")
    with (
        LinkProxy(clouds[0].port, LinkSpec(None, 0.0)) as proxy,
        language_agent(endless_llama, f"127.0.0.1:{proxy.port}", clouds[1].target) as agent,
    ):
        answer = Answer(agent, prompt, TOKENS, arm, CHATTER, at_token(lambda: lose(proxy)))
        went_on(agent, answer, ids, clouds[1], before)
        assert unanswered == [f"127.0.0.1:{proxy.port}"] * looks


def test_a_second_turn_after_a_restart(clouds: Clouds, endless_llama: Path, expected: Expected) -> None:
    """The service forgot the session: nothing is cached, the device brings all of it, the tokens are the same."""
    prompt, ids = expected
    longer = (*prompt, *ids[:40], *prompt)
    with language_agent(endless_llama, clouds[1].target) as stranger:
        fresh = Answer(stranger, longer, 30, "cloud", CHATTER)
    with language_agent(endless_llama, clouds[0].target) as agent:
        Answer(agent, prompt, 40, "cloud", CHATTER)
        kept = Answer(agent, longer, 30, "cloud", CHATTER)
        assert kept.how.cached > len(prompt) and kept.ids == fresh.ids
        clouds[0].kill()
        clouds[0].start()
        until(lambda: agent.replicas.best() is not None)
        again = Answer(agent, longer, 30, "cloud", CHATTER)
    assert again.how.cached == 0 and again.ids == fresh.ids
