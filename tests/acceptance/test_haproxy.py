"""Two services behind Debian's haproxy with the configuration that we ship: photos and prompts, deaths and drains."""

from __future__ import annotations

import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from isthmus.edge_agent import Answer, EdgeAgent, EdgeConfig, GenerationRequest, LanguageAgent, LanguageConfig
from isthmus.edge_agent.language.request import Summary, Token
from isthmus.edge_agent.policy.arms import Arm
from isthmus.models.vision.bundle import Bundle
from tests.bench.balancer import Haproxy
from tests.bench.processes import CloudProcess
from tests.bench.tiny_llama import write_tiny_llama

DEADLINE_S = 10.0
WATCHERS = 4
LANGUAGE = ("--dtype", "float32")


@pytest.fixture(autouse=True)
def _haproxy() -> None:
    if shutil.which("haproxy", path="/usr/sbin:/usr/local/sbin:/usr/bin:/usr/local/bin") is None:
        pytest.fail("haproxy is not installed, expected Debian's: apt-get install haproxy")


@contextmanager
def started(*clouds: CloudProcess) -> Iterator[Sequence[CloudProcess]]:
    """The services, started together."""
    with ExitStack() as stack:
        for cloud in clouds:
            stack.callback(cloud.stop)
            cloud.start(wait=False)
        for cloud in clouds:
            cloud.wait_serving()
        yield clouds


def until(condition: Callable[[], bool], within_s: float = 30.0) -> None:
    deadline_s = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline_s, "the condition did not come true"
        time.sleep(0.02)


def test_photos_under_sigkill_and_sigterm_of_replicas(tiny_bundle: Bundle, photo: Image.Image) -> None:
    """Photos in flight all the while, of two devices: each is answered by a cloud."""
    clouds = [CloudProcess(tiny_bundle.folder, arguments=("--threads", "1")) for _ in range(2)]
    config = EdgeConfig(tiny_bundle.folder, ("later:1",), "split", threads=1, deadline_s=DEADLINE_S, connect_s=10.0)
    answers: list[Answer] = []
    stop = threading.Event()

    def watch(agent: EdgeAgent) -> None:
        while not stop.is_set():
            answers.append(agent.infer(photo))

    def answered(more: int) -> None:
        goal = len(answers) + more
        until(lambda: len(answers) >= goal)

    with ExitStack() as stack:
        first, second = stack.enter_context(started(*clouds))
        balancer = stack.enter_context(Haproxy(first.target, second.target))
        agents = [stack.enter_context(EdgeAgent(replace(config, clouds=(balancer.target,)))) for _ in range(2)]
        watchers = [threading.Thread(target=watch, args=(agents[n % 2],)) for n in range(WATCHERS)]
        for watcher in watchers:
            watcher.start()
        answered(50)
        first.kill()
        answered(50)
        first.start()
        until(lambda: len(balancer.in_use()) == 2)
        answered(50)
        second.process.send_signal(signal.SIGTERM)  # type: ignore[union-attr]
        until(lambda: len(balancer.in_use()) == 1)
        assert second.stop() == 0
        answered(50)
        stop.set()
        for watcher in watchers:
            watcher.join()
        log = second.read_log()
    assert {answer.route for answer in answers} == {"split"}
    assert "drained" in log, "photos that came with the signal were answered before the end"


def test_devices_are_spread_over_both_replicas(tiny_bundle: Bundle, photo: Image.Image) -> None:
    clouds = [CloudProcess(tiny_bundle.folder, arguments=("--threads", "1")) for _ in range(2)]
    with started(*clouds), Haproxy(clouds[0].target, clouds[1].target) as balancer, ExitStack() as stack:
        config = EdgeConfig(
            tiny_bundle.folder, (balancer.target,), "split", threads=1, deadline_s=DEADLINE_S, connect_s=10.0
        )
        agents = [stack.enter_context(EdgeAgent(config)) for _ in range(4)]
        for _ in range(5):
            assert [agent.infer(photo).route for agent in agents] == ["split"] * 4
        counts = [cloud.metric("requests_total", method="InferStream", code="OK") for cloud in clouds]
    assert counts == [10, 10], "four streams, two at each"


@pytest.mark.parametrize("arm", ["cloud", "verify"])
def test_a_chat_goes_on_wherever_its_turns_land(tmp_path: Path, arm: Arm) -> None:
    """Sessions are caches: the replica that answers a turn is killed in mid-answer, and later another drains."""
    model = write_tiny_llama(tmp_path / "tiny", seed=1)
    clouds = [CloudProcess(arguments=("--model", str(model), "--threads", "1", *LANGUAGE)) for _ in range(2)]
    disturbed: list[str] = []
    with started(*clouds), Haproxy(clouds[0].target, clouds[1].target) as balancer:
        names = dict(zip(("replica1", "replica2"), clouds, strict=True))

        def disturb(turn: int) -> None:
            if turn in (1, 3):
                (name,) = balancer.busy()
                names[name].process.send_signal(signal.SIGKILL if turn == 1 else signal.SIGTERM)  # type: ignore[union-attr]
                disturbed.append(name)
            if turn == 2:
                names[disturbed[0]].start()
                until(lambda: len(balancer.in_use()) == 2)

        config = LanguageConfig(str(model), (clouds[0].target,), threads=1, on_loss="wait", connect_s=10.0)
        with LanguageAgent(config) as direct:
            expected = chat(direct, "cloud", lambda turn: None)
        with LanguageAgent(replace(config, clouds=(balancer.target,))) as agent:
            found = chat(agent, arm, disturb)
    assert [tokens for tokens, _ in found] == [tokens for tokens, _ in expected]
    assert len(disturbed) == 2 and not any(summary.degraded for _, summary in found)


def chat(agent: LanguageAgent, arm: Arm, disturb: Callable[[int], None]) -> list[tuple[list[int], Summary]]:
    """Tokens and summary of each of five turns; `disturb` is called with the turn's number in mid-answer."""
    text, turns = [ord(letter) for letter in "One turn after the other, each with all that was said before. "], []
    for turn in range(5):
        tokens: list[int] = []
        summary: Summary | None = None
        for event in agent.generate(GenerationRequest(tuple(text), 24, arm)):
            if isinstance(event, Token):
                tokens.append(event.id)
                if len(tokens) == 4:
                    disturb(turn)
            else:
                summary = event
        assert summary is not None
        turns.append((tokens, summary))
        text += [*tokens, 65 + turn]
    return turns
