"""A service over an engine that is another process: answered, killed and started again, absent at first."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.bench.processes import ROOT, CloudProcess, free_port
from tests.contract.language_parts import Answer, language_agent, until
from tests.scripted_engine import answer_to

TOKENS = 120
PROMPT = (41, 50, 60, 70)  # whose answer is longer


class EngineProcess:
    """A scripted engine, which may be killed and started again at the same port."""

    def __init__(self, *arguments: str) -> None:
        self.port = free_port()
        self._command = [sys.executable, "-m", "tests.scripted_engine", str(self.port), *arguments]
        self.process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        self.process = subprocess.Popen(self._command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        assert self.process.stdout.readline()

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.communicate()


@pytest.fixture
def engine() -> Iterator[EngineProcess]:
    process = EngineProcess("vllm", "3")
    try:
        yield process
    finally:
        process.kill()


def service(engine: EngineProcess, tokenizer: Path, *more: str) -> CloudProcess:
    arguments = ("--engine-url", f"http://127.0.0.1:{engine.port}/v1", "--engine-tokenizer", str(tokenizer))
    return CloudProcess(arguments=(*arguments, "--engine-check-tokens", "100", *more))


def check(cloud: CloudProcess) -> tuple[int, list[str]]:
    """What `cloud-service --check` says."""
    command = [sys.executable, "-m", "isthmus.cloud_service", "--check", cloud.target]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stderr == ""
    return done.returncode, done.stdout.splitlines()


def test_an_engine_that_is_killed_twice_in_an_answer_loses_and_doubles_no_token(
    engine: EngineProcess, tiny_llama: Path
) -> None:
    engine.start()
    with service(engine, tiny_llama) as cloud:
        until(lambda: cloud.metric("engine_up") == 1)

        def strike(made: int) -> None:
            if made in (20, 70):
                engine.kill()
                engine.start()

        with language_agent(None, cloud.target, on_loss="wait", draft="lookup") as agent:
            answer = Answer(agent, PROMPT, TOKENS, "cloud", meanwhile=strike)
            assert answer.ids == answer_to(PROMPT, TOKENS)
            drafted = Answer(agent, PROMPT, TOKENS, "verify")
            assert drafted.ids == answer.ids
        assert cloud.metric("engine_compared_tokens", result="different") == 0
        assert cloud.metric("engine_errors_total", kind="lost") >= 2


def test_a_service_serves_without_its_engine_and_uses_it_when_it_comes(
    engine: EngineProcess, tiny_llama: Path, tmp_path: Path
) -> None:
    key = tmp_path / "key"
    key.write_text("sk-not-for-any-log\n")
    with service(engine, tiny_llama, "--engine-key-file", str(key)) as cloud:
        status, lines = check(cloud)
        assert (status, lines[0]) == (1, "SERVING")
        assert lines[1:] == ["the engine does not answer (connection refused)"]
        engine.start()
        until(lambda: cloud.metric("engine_up") == 1)
        assert check(cloud) == (0, ["SERVING", f"engine: tiny, context 512, cloud, verify; {compared(cloud)}"])
        log = cloud.read_log()
    assert log.count("cannot be used: the engine does not answer (connection refused)") == 1
    assert "sk-not-for-any-log" not in log
    assert "Traceback" not in log


def compared(cloud: CloudProcess) -> str:
    tokens = int(cloud.metric("engine_compared_tokens"))
    return f"0 of {tokens} tokens differed between streaming and verifying"
