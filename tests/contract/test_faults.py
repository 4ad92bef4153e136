"""When the cloud dies, drains, hangs or comes back, every photo is answered once and within its deadline."""

from __future__ import annotations

import shutil
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from isthmus.edge_agent import Answer, EdgeAgent
from isthmus.edge_agent.config import WholeImage
from isthmus.edge_agent.policy.breaker import BreakerLimits
from isthmus.models.vision.bundle import Bundle
from isthmus.protos.limits import PING_TIMEOUT_MS
from tests.bench.processes import CloudProcess, free_port
from tests.bench.proxy import LinkProxy, LinkSpec
from tests.tiny_bundle import random_split, write_tiny_bundle

NewAgent = Callable[..., EdgeAgent]
DEADLINE_S = 1.0
WATCHERS = 4
GRACE_S = 0.1  # an answer may be later than its deadline by this much


def until(condition: Callable[[], bool], within_s: float = 20.0) -> None:
    deadline_s = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline_s, "the condition did not come true"
        time.sleep(0.02)


def late(answers: list[Answer], deadline_s: float = DEADLINE_S) -> list[Answer]:
    return [answer for answer in answers if answer.stage_ms["total"] > 1000 * (deadline_s + GRACE_S)]


def test_a_cloud_that_is_killed_and_started_again(tiny_bundle: Bundle, new_agent: NewAgent, photo: Image.Image) -> None:
    """SIGKILL with photos in flight: each is answered exactly once, in time, and the cloud is used again later."""
    with CloudProcess(tiny_bundle.folder, arguments=("--threads", "1")) as cloud:
        agent = new_agent(cloud.target, mode="split", deadline_s=DEADLINE_S)
        answers: list[Answer] = []
        stop = threading.Event()

        def watch() -> None:
            while not stop.is_set():
                answers.append(agent.infer(photo))

        watchers = [threading.Thread(target=watch) for _ in range(2)]
        for watcher in watchers:
            watcher.start()
        until(lambda: sum(answer.route == "split" for answer in answers) >= 20)
        cloud.kill()
        until(lambda: sum(answer.route == "fallback" for answer in answers) >= 20)
        before = len(answers)
        cloud.start()
        until(lambda: any(answer.route == "split" for answer in answers[before:]))
        stop.set()
        for watcher in watchers:
            watcher.join()
    assert {answer.route for answer in answers} == {"split", "fallback"}
    assert all(answer.degraded == (answer.route == "fallback") for answer in answers)
    assert not late(answers)


def test_with_two_clouds_the_first_may_fall_silent_come_back_and_die(
    tiny_bundle: Bundle, new_agent: NewAgent, photo: Image.Image
) -> None:
    """Photos in flight all the while: none is late, and none is left to the device when a cloud dies."""
    clouds = [CloudProcess(tiny_bundle.folder, arguments=("--threads", "1")) for _ in range(2)]
    with ExitStack() as stack:
        for cloud in clouds:
            stack.callback(cloud.stop)
            cloud.start(wait=False)
        for cloud in clouds:
            cloud.wait_serving()
        first, second = clouds
        agent = new_agent(*(c.target for c in clouds), mode="split", deadline_s=2.0, breaker=BreakerLimits(1, 0.1, 0.5))
        answers: list[Answer] = []
        stop = threading.Event()

        def watch() -> None:
            while not stop.is_set():
                answers.append(agent.infer(photo))

        def states() -> list[str]:
            return [link.state for link in agent.replicas]

        watchers = [threading.Thread(target=watch) for _ in range(WATCHERS)]
        for watcher in watchers:
            watcher.start()
        until(lambda: len(answers) >= 20)
        first.process.send_signal(signal.SIGSTOP)  # type: ignore[union-attr]
        until(lambda: states() == ["open", "closed"])
        first.process.send_signal(signal.SIGCONT)  # type: ignore[union-attr]
        until(lambda: states() == ["closed", "closed"])
        silent = len(answers)
        until(lambda: len(answers) >= silent + 20)
        first.kill()
        until(lambda: states() == ["open", "closed"])
        stop.set()
        for watcher in watchers:
            watcher.join()
    assert not late(answers, 2.0)
    assert any("no answer from the cloud" in a.why and f"sent to {second.target}" in a.why for a in answers[:silent])
    assert sum(answer.degraded for answer in answers[:silent]) <= WATCHERS, (
        "at most those in flight when it fell silent"
    )
    assert {answer.route for answer in answers[silent:]} == {"split"}


def test_drains_on_sigterm_without_a_failed_request(
    tiny_bundle: Bundle, new_agent: NewAgent, photo: Image.Image
) -> None:
    with CloudProcess(tiny_bundle.folder, arguments=("--threads", "1")) as cloud:
        agent = new_agent(cloud.target, mode="split", deadline_s=20.0)
        agent.infer(photo)
        with ThreadPoolExecutor(16) as threads:
            answers = [threads.submit(agent.infer, photo) for _ in range(64)]
            until(lambda: any(answer.done() for answer in answers))
            cloud.process.terminate()  # type: ignore[union-attr]
            results = [answer.result() for answer in answers]
        assert cloud.stop() == 0
    # What was sent before the service began to drain is answered by it; only later photos stay on the device.
    assert all(
        "but" not in r.why or "shutting down" in r.why or "connect" in r.why or "being tried" in r.why for r in results
    )
    assert any(not result.degraded for result in results)
    assert "drained" in cloud.log_text


def test_requests_in_flight_at_sigterm_are_answered(
    tiny_bundle: Bundle, new_agent: NewAgent, photo: Image.Image
) -> None:
    """The batch waits a second to fill, so that all eight requests are in the queue when the signal comes."""
    arguments = ("--threads", "1", "--max-wait-ms", "1000", "--max-batch", "64")
    with CloudProcess(tiny_bundle.folder, arguments=arguments) as cloud:
        agent = new_agent(cloud.target, mode="split", deadline_s=20.0)
        agent.infer(photo)
        with ThreadPoolExecutor(8) as threads:
            answers = [threads.submit(agent.infer, photo) for _ in range(8)]
            time.sleep(0.5)
            cloud.process.terminate()  # type: ignore[union-attr]
            results = [answer.result() for answer in answers]
        assert cloud.stop() == 0
    assert [result.route for result in results] == ["split"] * 8


def test_repeated_signals_end_in_a_clean_exit(tiny_bundle: Bundle) -> None:
    with CloudProcess(tiny_bundle.folder) as cloud:
        assert cloud.process is not None
        while cloud.process.poll() is None:
            cloud.process.terminate()
            time.sleep(0.002)
        assert cloud.process.returncode == 0


def test_a_cloud_restarted_with_another_bundle_costs_one_upload(
    tiny_bundle: Bundle, tmp_path: Path, new_agent: NewAgent, photo: Image.Image
) -> None:
    other = random_split()
    with torch.no_grad():
        next(other.parameters()).add_(0.01)
    folder = Path(shutil.copytree(tiny_bundle.folder, tmp_path / "held"))
    with CloudProcess(folder, arguments=("--threads", "1")) as cloud:
        agent = new_agent(cloud.target, mode="split", deadline_s=5.0)
        assert agent.infer(photo).route == "split"
        cloud.kill()
        shutil.rmtree(folder)
        write_tiny_bundle(folder, other)
        cloud.start()
        refused = [agent.infer(photo) for _ in range(20)]
        assert sum(answer.bytes_up > 0 for answer in refused) <= 1
    assert all(answer.degraded for answer in refused)


def test_nothing_is_sent_to_a_dead_cloud(new_agent: NewAgent, photo: Image.Image) -> None:
    agent = new_agent(f"127.0.0.1:{free_port()}", mode="split", connect_s=0.5)
    answers = [agent.infer(photo) for _ in range(10)]
    assert all(answer.degraded and answer.bytes_up == 0 for answer in answers)
    assert [link.state for link in agent.replicas] == ["open"]


def test_a_half_open_link_costs_at_most_the_deadline(
    cloud: CloudProcess, new_agent: NewAgent, photo: Image.Image
) -> None:
    """Bytes are lost without an error: three photos wait for their deadline, then the breaker opens."""
    with LinkProxy(cloud.port, LinkSpec(None, 0.0)) as proxy:
        agent = new_agent(f"127.0.0.1:{proxy.port}", mode="split", deadline_s=0.5)
        assert agent.infer(photo).route == "split"
        proxy.black_hole(True)
        proxy.cut()
        lost = [agent.infer(photo) for _ in range(8)]
        assert [link.state for link in agent.replicas] == ["open"]
        proxy.black_hole(False)
        proxy.cut()
        until(lambda: agent.infer(photo).route == "split")
    assert all(answer.degraded for answer in lost) and not late(lost, 0.5)
    assert sum("no answer" in answer.why for answer in lost) <= 3


def test_a_photo_that_fills_a_thin_uplink_for_longer_than_a_ping_may_take_is_answered(
    elpv_bundle: Bundle, new_agent: NewAgent
) -> None:
    """Its bytes hold up everything behind them, a ping of the connection too."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 300, 3), np.uint8))
    settings = {"bundle": elpv_bundle.folder, "mode": "offload", "whole_image": WholeImage(form="png")}
    with CloudProcess(elpv_bundle.folder) as cloud, LinkProxy(cloud.port, LinkSpec(800e3, 0.05)) as thin:
        answer = new_agent(f"127.0.0.1:{thin.port}", deadline_s=20.0, **settings).infer(noise)
    assert (answer.route, answer.degraded) == ("offload", False), answer.why
    assert 8 * answer.bytes_up / 800e3 > PING_TIMEOUT_MS / 1000


def test_a_reply_after_the_deadline_is_dropped(cloud: CloudProcess, new_agent: NewAgent, photo: Image.Image) -> None:
    with LinkProxy(cloud.port, LinkSpec(None, 0.4)) as slow:
        agent = new_agent(f"127.0.0.1:{slow.port}", mode="split", deadline_s=0.2)
        answer = agent.infer(photo)
    assert answer.route == "fallback" and answer.degraded and not late([answer], 0.2)


@pytest.mark.parametrize("mode", ["auto", "split", "offload"])
def test_every_mode_answers_without_a_cloud(new_agent: NewAgent, photo: Image.Image, mode: str) -> None:
    answer = new_agent(f"127.0.0.1:{free_port()}", mode=mode, connect_s=0.2).infer(photo)
    assert answer.degraded and answer.exit is not None and abs(sum(answer.probabilities) - 1) < 1e-5
