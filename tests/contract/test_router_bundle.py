"""A router bundle made from a running service, and an agent that uses it with that service and with no other."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from isthmus.models.language.checkpoint.checkpoint import Checkpoint
from isthmus.models.language.router.bundle import RouterBundle
from isthmus.models.recipes.__main__ import main
from isthmus.models.recipes.language import router_answers
from tests.bench.processes import CloudProcess
from tests.bench.tiny_llama import write_tiny_llama
from tests.contract.conftest import LANGUAGE
from tests.contract.language_parts import Answer, language_agent, prompt_of, until
from tests.contract.test_engines import EngineProcess, check, service

PROMPTS = 40


def recipe(device: Path, cloud: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> RouterBundle:
    """What the command makes of short answers."""
    monkeypatch.setattr(router_answers, "ANSWER_TOKENS", 6)
    (folder / "prompts.txt").write_text("".join(f"What is {index}?\n" for index in range(PROMPTS)))
    command = ["router", "--device", str(device), "--cloud", cloud, "--prompts", str(folder / "prompts.txt")]
    done = CliRunner().invoke(main, [*command, "--out", str(folder / "made"), "--work", str(folder / "work")])
    assert done.exit_code == 0, done.stderr
    assert "quality 0.999: not certified, " in done.stdout
    return RouterBundle.open(folder / "made")


def test_from_a_service_that_holds_the_weights(
    endless_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with CloudProcess(arguments=("--model", str(endless_llama), *LANGUAGE)) as cloud:
        bundle = recipe(endless_llama, cloud.target, tmp_path, monkeypatch)
        assert bundle.manifest.cloud.weights == Checkpoint.open(endless_llama).fingerprint.hex()
        with language_agent(endless_llama, cloud.target, router=bundle.folder, device_bits=8) as agent:
            status = agent.status()
            assert (status["router"], status["router_problem"]) == (bundle.manifest.name, None)
            assert 0 < status["router_quality"] < 1
            answer = Answer(agent, prompt_of(agent, "What is 41?"), 8, "auto", quality=0.9999)
            assert f"router bundle {bundle.manifest.name} is certified up to quality 0." in answer.how.why
        with language_agent(endless_llama, cloud.target, router=bundle.folder, device_bits=4) as other:
            status = other.status()
            assert status["router"] is None and status["router_problem"].endswith("has 4: it is not used")
            assert "has 4: it is not used" in Answer(other, prompt_of(other, "Hi"), 4, "auto", quality=0.9).how.why


def test_from_an_engine_that_shows_its_choices_only(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, another = EngineProcess("vllm", "3"), write_tiny_llama(tmp_path / "another")
    try:
        engine.start()
        with service(engine, tiny_llama) as cloud:
            until(lambda: check(cloud)[0] == 0)
            bundle = recipe(tiny_llama, cloud.target, tmp_path, monkeypatch)
            assert bundle.manifest.cloud.weights is None and bundle.manifest.cloud.name
            with language_agent(tiny_llama, cloud.target, router=bundle.folder, device_bits=8) as agent:
                assert agent.status()["router"] == bundle.manifest.name
        with (
            CloudProcess(arguments=("--model", str(another), *LANGUAGE)) as other,
            language_agent(tiny_llama, other.target, router=bundle.folder, device_bits=8) as agent,
        ):
            status = agent.status()
            assert status["router"] is None and "no router bundle is for another " in status["router_problem"]
    finally:
        engine.kill()
