"""Two answers at once on one device, for every arm: each has its own text, and neither waits for the other."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from isthmus.edge_agent.language.agent import LanguageAgent
from isthmus.edge_agent.policy.arms import ARMS, Arm
from isthmus.models.language.checkpoint.checkpoint import Checkpoint
from tests.bench.processes import CloudProcess
from tests.bench.proxy import LinkProxy, LinkSpec
from tests.contract.conftest import LANGUAGE
from tests.contract.language_parts import Answer, language_agent, prompt_of
from tests.tiny_handoff import write_tiny_handoff

TOKENS = 24
FIRST, SECOND = "Tell me a long story.", "And now a short one, please."
EXACT: tuple[Arm, ...] = ("edge", "cloud", "verify")  # the others' texts depend on what a moment costs
WITHOUT_A_BUNDLE = [arm for arm in ARMS if arm != "cascade"]  # that needs a router bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, endless_llama: Path) -> Path:
    return write_tiny_handoff(tmp_path_factory.mktemp("handoffs") / "tiny", Checkpoint.open(endless_llama))


@pytest.fixture(scope="module")
def cloud(endless_llama: Path, bundle: Path) -> Iterator[CloudProcess]:
    with CloudProcess(arguments=("--model", str(endless_llama), "--handoff", str(bundle), *LANGUAGE)) as process:
        yield process


def together(agent: LanguageAgent, one: Arm, other: Arm) -> list[Answer]:
    """An answer by each arm, begun at the same moment."""
    start = threading.Barrier(2)

    def answer(text: str, arm: Arm) -> Answer:
        prompt = prompt_of(agent, text)
        start.wait(10)
        return Answer(agent, prompt, TOKENS, arm)

    with ThreadPoolExecutor(2) as threads:
        return list(threads.map(answer, (FIRST, SECOND), (one, other)))


@pytest.fixture(scope="module")
def agent(cloud: CloudProcess, endless_llama: Path, bundle: Path) -> Iterator[LanguageAgent]:
    with language_agent(endless_llama, cloud.target, handoff=bundle, device_bits=8) as made:
        yield made


@pytest.mark.parametrize("arm", WITHOUT_A_BUNDLE)
@pytest.mark.parametrize("beside", ["edge", "verify"])
def test_with_a_cloud_both_are_answered(agent: LanguageAgent, arm: Arm, beside: Arm) -> None:
    answers = together(agent, arm, beside)
    for text, each, name in zip((FIRST, SECOND), answers, (arm, beside), strict=True):
        assert len(each.ids) == TOKENS and not each.how.degraded
        if name in EXACT:
            assert each.ids == Answer(agent, prompt_of(agent, text), TOKENS, name).ids


@pytest.mark.parametrize("arm", WITHOUT_A_BUNDLE)
def test_without_a_cloud_both_are_the_devices(endless_llama: Path, bundle: Path, arm: Arm) -> None:
    with language_agent(endless_llama, "127.0.0.1:1", handoff=bundle, device_bits=8, connect_s=1.0) as alone:
        expected = [Answer(alone, prompt_of(alone, text), TOKENS, "edge").ids for text in (FIRST, SECOND)]
        assert [answer.ids for answer in together(alone, arm, arm)] == expected


@pytest.mark.parametrize("arm", ["cloud", "verify", "handoff", "auto"])
def test_a_private_answer_does_not_wait_for_one_that_waits_for_its_cloud(
    cloud: CloudProcess, endless_llama: Path, bundle: Path, arm: Arm
) -> None:
    """The link swallows everything; until the private answer is there, nothing comes of the other one."""
    with (
        LinkProxy(cloud.port, LinkSpec(None, 0.0)) as proxy,
        language_agent(
            endless_llama, f"127.0.0.1:{proxy.port}", handoff=bundle, device_bits=8, on_loss="wait", quality=1.0
        ) as agent,
    ):
        proxy.silence(True)
        order: list[str] = []

        def hanging() -> Answer:
            quality = 1.0 if arm == "auto" else None
            answer = Answer(agent, prompt_of(agent, FIRST), TOKENS, arm, quality=quality)
            order.append("answered")
            return answer

        with ThreadPoolExecutor(1) as threads:
            rest = threads.submit(hanging)
            private = Answer(agent, prompt_of(agent, SECOND), 8, "edge")
            order.append("private")
            proxy.silence(False)
            proxy.cut()
            assert len(rest.result(60).ids) == TOKENS
        assert len(private.ids) == 8 and order == ["private", "answered"]
