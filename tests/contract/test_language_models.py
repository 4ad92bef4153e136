"""A real cloud and devices that hold another model than it, one of another vocabulary, or none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from isthmus.edge_agent.config import LanguageConfig
from isthmus.edge_agent.language.agent import LanguageAgent
from isthmus.models.messages import GREEDY
from tests.bench.processes import ROOT, CloudProcess
from tests.bench.tiny_llama import write_tiny_llama
from tests.contract.conftest import LANGUAGE
from tests.contract.language_parts import CHATTER, Answer, prompt_of, until

TOKENS = 24
TEXTS = ("What is a bridge?", "one two three one two three one two")


@pytest.fixture(scope="module")
def cloud(endless_llama: Path) -> Iterator[CloudProcess]:
    with CloudProcess(arguments=("--model", str(endless_llama), *LANGUAGE)) as process:
        yield process


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "isthmus/tokenizers"


def agent(cloud: CloudProcess, model: Path | None = None, draft: str = "model") -> LanguageAgent:
    config = LanguageConfig(str(model) if model else None, (cloud.target,), threads=1, connect_s=10.0)
    return LanguageAgent(replace(config, draft=draft))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def expected(cloud: CloudProcess, endless_llama: Path) -> list[list[int]]:
    """What `cloud` says to a device that holds the same model."""
    with agent(cloud, endless_llama) as same:
        return [
            Answer(same, prompt_of(same, text), TOKENS, "cloud", sampling).ids
            for text in TEXTS
            for sampling in (GREEDY, CHATTER)
        ]


def answers(asked: LanguageAgent, arm: str) -> list[list[int]]:
    return [
        Answer(asked, prompt_of(asked, text), TOKENS, arm, sampling).ids  # type: ignore[arg-type]
        for text in TEXTS
        for sampling in (GREEDY, CHATTER)
    ]


def test_a_device_without_a_model_gets_the_same_tokens(
    cloud: CloudProcess, expected: list[list[int]], cache: Path
) -> None:
    with agent(cloud) as none, agent(cloud, draft="lookup") as lookup:
        assert none.arms() == ("auto", "cloud")
        assert answers(none, "cloud") == answers(none, "auto") == answers(lookup, "verify") == expected
        assert [file.name for file in cache.iterdir()] == [none.tokenizer.fingerprint.hex()]


def test_other_weights_of_the_same_vocabulary_verify_without_loss(
    cloud: CloudProcess, expected: list[list[int]], tmp_path: Path, cache: Path
) -> None:
    small = write_tiny_llama(tmp_path / "small", layers=1, seed=7, scale=0.3)
    with agent(cloud, small) as other:
        assert other.arms() == ("auto", "edge", "cloud", "verify")
        assert answers(other, "verify") == answers(other, "auto") == answers(other, "cloud") == expected
        assert answers(other, "edge") != expected
    assert not cache.exists(), "its own tokenizer is the cloud's"


def test_another_vocabulary_gives_whole_answers(cloud: CloudProcess, expected: list[list[int]], tmp_path: Path) -> None:
    pieces = write_tiny_llama(tmp_path / "pieces", vocab="pieces", scale=0.3)
    with agent(cloud, pieces) as other, agent(cloud, pieces, draft="lookup") as lookup:
        assert (other.arms(), lookup.arms()) == (("auto", "edge", "cloud"), ("auto", "edge", "cloud", "verify"))
        assert answers(other, "auto") == answers(other, "cloud") == answers(lookup, "verify") == expected
        alone = other.answer("one two", arm="edge", max_tokens=8)
        assert alone.summary is not None and alone.summary.bytes_up == 0


def test_a_cloud_that_comes_back_with_another_model_is_used(
    endless_llama: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    """One address, two models with one tokenizer; the device has none."""
    link = tmp_path / "model"
    link.symlink_to(endless_llama)
    with CloudProcess(arguments=("--model", str(link), *LANGUAGE)) as changing, agent(changing) as device:
        former = Answer(device, prompt_of(device, TEXTS[0]), 8, "cloud")
        assert device.name == endless_llama.name
        changing.stop()
        link.unlink()
        link.symlink_to(tiny_llama)
        changing.start()
        until(lambda: device.replicas.best() is not None)
        newer = Answer(device, prompt_of(device, TEXTS[0]), 8, "cloud")
        assert device.name == tiny_llama.name and not newer.how.degraded and newer.ids != former.ids


def test_the_chat_needs_a_cloud_alone(cloud: CloudProcess, endless_llama: Path) -> None:
    def chat(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "isthmus.edge_agent", "chat", "--json", "--max-tokens", "8", *arguments]
        return subprocess.run(
            command, input="hi\n", cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, timeout=60
        )

    done = chat("--cloud", cloud.target, "--connect-s", "10")
    row = json.loads(done.stdout)
    assert (done.returncode, done.stderr, row["arm"], row["made"]["cloud"]) == (0, "", "cloud", 8)
    wrong = chat("--cloud", cloud.target, "--connect-s", "10", "--cloud-model", "huge")
    assert (wrong.returncode, wrong.stdout) == (1, "")
    words = f"the cloud holds no language model 'huge', it holds {endless_llama.name}"
    assert wrong.stderr == f"error: cloud {cloud.target}: {words}\n"
