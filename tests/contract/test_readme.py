"""README tells the truth: its commands are run here as they stand, only on ports of their own."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from isthmus.models.recipes.vision.elpv_data import load
from tests.bench.processes import ROOT, free_port

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
COMMANDS = [
    line.split("  #")[0].strip() for kind, block in BLOCKS if kind == "bash" for line in block.splitlines() if line
]
SERVERS = ("cloud-service", "edge-agent run")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, str]]]:
    """A folder with `photo.png` and the shipped bundles in which the README's two servers run, and their ports."""
    folder = tmp_path_factory.mktemp("readme")
    shutil.copy(load("calibration").paths[0], folder / "photo.png")
    (folder / "models").symlink_to(ROOT / "models")
    ports = {port: str(free_port()) for port in ("50051", "9101", "8080")}
    servers = []
    try:
        for start, ready in zip(SERVERS, (ports["9101"] + "/metrics", ports["8080"] + "/healthz"), strict=True):
            (command,) = (line for line in COMMANDS if line.startswith(start))
            servers.append(subprocess.Popen(shlex.split(renamed(command, ports)), cwd=folder, env=environment()))
            wait_for(f"http://127.0.0.1:{ready}")
        yield folder, ports
    finally:
        for server in servers:
            server.terminate()
            server.wait(30)


def environment() -> dict[str, str]:
    binaries = str(Path(sys.executable).parent)
    return {**os.environ, "PATH": binaries + os.pathsep + os.environ["PATH"], "PYTHONPATH": str(ROOT)}


def renamed(command: str, ports: dict[str, str]) -> str:
    for readme_port, port in ports.items():
        command = command.replace(f":{readme_port}", f":{port}")
    return command


def wait_for(url: str) -> None:
    for _ in range(600):
        try:
            with urllib.request.urlopen(url, timeout=1):
                return
        except OSError:
            time.sleep(0.1)
    raise AssertionError(f"{url} did not answer")


@pytest.mark.parametrize(
    "command", [line for line in COMMANDS if not line.startswith((*SERVERS, "make"))], ids=lambda line: line[:60]
)
def test_command_runs(place: tuple[Path, dict[str, str]], command: str) -> None:
    folder, ports = place
    result = subprocess.run(
        ["bash", "-c", renamed(command, ports)],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.strip()
    assert "DEGRADED" not in result.stdout and not result.stdout.startswith('{"error"')


def test_python_snippet_runs(place: tuple[Path, dict[str, str]]) -> None:
    folder, ports = place
    (snippet,) = (block for kind, block in BLOCKS if kind == "python")
    result = subprocess.run(
        [sys.executable, "-c", renamed(snippet, ports)],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.split()[0] in ("functional", "defective")


@pytest.mark.parametrize("target", sorted(set(re.findall(r"(?:`|^)make ([a-z-]+)", README, re.MULTILINE))))
def test_make_target_exists(target: str) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert target == "env" or re.search(rf"^{target}:.*##", makefile, re.MULTILINE)


def test_files_it_links_to_exist() -> None:
    for link in re.findall(r"\]\(((?!http)[^)]+)\)", README):
        assert (ROOT / link).exists(), link
