"""What tests of a service before an engine share: a chat, an answer's tokens, and what a person sees of a problem."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from PIL import Image

from isthmus.edge_agent import EdgeAgent, EdgeConfig, GenerationRequest, LanguageAgent
from isthmus.edge_agent.language.request import Summary, Token
from isthmus.edge_agent.policy.arms import Arm
from isthmus.models.vision.bundle import Bundle
from tests.bench.processes import ROOT, CloudProcess

COMMAND_S = 120.0
LINE_S = 60.0
PROMPTS = (
    "What is a lagoon?",
    "Write one sentence about déjà vu 😀 and 漢字.",
    "Count: one two three, one two three, one two",
    "def add(a, b):",
)


def chat(cloud: CloudProcess, *arguments: str, question: str = PROMPTS[0]) -> tuple[int, dict[str, Any], str]:
    """`edge-agent chat --json` with one question: exit status, the last object that it printed, and its stderr."""
    command = [sys.executable, "-m", "isthmus.edge_agent", "chat", "--json", "--cloud", cloud.target, *arguments]
    done = subprocess.run(
        command, input=question + "\n", capture_output=True, text=True, timeout=COMMAND_S, cwd=ROOT, check=False
    )
    assert "Traceback" not in done.stderr
    lines = done.stdout.splitlines()
    return done.returncode, json.loads(lines[-1]) if lines else {}, done.stderr


def tokens_of(
    agent: LanguageAgent,
    prompt: tuple[int, ...],
    arm: Arm,
    count: int,
    disturb: Callable[[], None] = lambda: None,
) -> tuple[list[int], Summary]:
    """Tokens and summary of an answer; `disturb` is called after the fourth token."""
    found: list[int] = []
    for event in agent.generate(GenerationRequest(prompt, count, arm)):
        if isinstance(event, Summary):
            return found, event
        if isinstance(event, Token):
            found.append(event.id)
            if len(found) == 4:
                disturb()
    raise AssertionError("an answer without a summary")


def wait_line(cloud: CloudProcess, pattern: str) -> str:
    """The one line of the log with `pattern`, without its time, once it is there; it must be the only one."""
    deadline_s = time.monotonic() + LINE_S
    while not (lines := [line for line in cloud.read_log().splitlines() if re.search(pattern, line)]):
        assert time.monotonic() < deadline_s, f"no line with {pattern!r}:\n{cloud.read_log()}"
        time.sleep(0.1)
    assert len(lines) == 1, lines
    return lines[0].split(maxsplit=3)[-1]


def check(cloud: CloudProcess) -> tuple[int, str]:
    """`cloud-service --check`: exit status and what it prints."""
    command = [sys.executable, "-m", "isthmus.cloud_service", "--check", cloud.target]
    done = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_S, cwd=ROOT, check=False)
    return done.returncode, done.stdout + done.stderr


def photo_route(cloud: CloudProcess, bundle: Bundle, photo: Image.Image) -> str:
    """Where a photo is answered that the cloud should compute."""
    config = EdgeConfig(bundle.folder, (cloud.target,), "split", threads=1, deadline_s=10.0, connect_s=10.0)
    with EdgeAgent(config) as agent:
        return agent.infer(photo).route
