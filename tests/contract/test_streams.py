"""`edge-agent watch` as a process: no frame is unaccounted for when the agent or the cloud is killed."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from isthmus.models.vision.bundle import Bundle
from tests.bench.processes import ROOT, CloudProcess
from tests.tiny_clip import scenes, write_clip

FRAMES = 150


def watch(bundle: Bundle, clip: Path, results: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "isthmus.edge_agent", "watch", f"front={clip}", "--bundle", str(bundle.folder)]
    command += ["--threads", "1", "--results", str(results), *more]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def read(results: Path) -> list[dict[str, Any]]:
    """Whole lines; a killed agent may have left a part of one."""
    text = results.read_text() if results.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def frames(results: Path) -> list[int]:
    return [line["frame"] for line in read(results) if "frame" in line]


def until(condition: Callable[[], bool], within_s: float = 60.0) -> None:
    deadline_s = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline_s, "the condition did not come true"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clips") / "clip.mp4", scenes(*[1] * FRAMES), rate=50)


def test_no_frame_is_lost_or_told_twice_when_the_agent_is_killed(
    tiny_bundle: Bundle, clip: Path, tmp_path: Path
) -> None:
    results = tmp_path / "results.jsonl"
    running = watch(tiny_bundle, clip, results, "--realtime", "--when-full", "block")
    until(lambda: len(frames(results)) > 20)
    running.kill()
    running.communicate()
    with results.open("a") as file:
        file.write('{"camera": "front", "fra')  # as a power cut would leave it
    again = watch(tiny_bundle, clip, results, "--resume")
    _, errors = again.communicate(timeout=60)
    assert again.returncode == 0, errors
    lines = read(results)
    assert frames(results) == list(range(FRAMES))
    starts = [line for line in lines if line.get("event") == "start"]
    after = starts[1]["after"]
    assert 20 <= after < FRAMES and lines[-1]["frames"] == FRAMES - 1 - after
    assert {line["outcome"] for line in lines if "frame" in line} == {"answered"}


def test_no_frame_is_lost_when_the_cloud_is_killed(tiny_bundle: Bundle, clip: Path, tmp_path: Path) -> None:
    results = tmp_path / "results.jsonl"
    with CloudProcess(tiny_bundle.folder, arguments=("--threads", "1")) as cloud:
        more = ("--realtime", "--when-full", "block", "--cloud", cloud.target, "--mode", "offload")
        running = watch(tiny_bundle, clip, results, *more)
        until(lambda: len(frames(results)) > 20)
        cloud.kill()
        out, errors = running.communicate(timeout=60)
    assert running.returncode == 0, errors
    assert frames(results) == list(range(FRAMES))
    lines = [line for line in read(results) if "frame" in line]
    assert {line["outcome"] for line in lines} == {"answered"}
    assert {"offload", "fallback"} == {line["route"] for line in lines}
    assert out == "" and "150 frames: 150 answered" in errors
