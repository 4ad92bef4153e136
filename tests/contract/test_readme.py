"""README and tutorials tell the truth: their commands are run here as they stand, only on ports of their own."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.bench.processes import ROOT, free_port

PAGES = ("README.md", "docs/tutorials/photo.md", "docs/tutorials/chat.md", "docs/reference/configuration.md")
MAX_README_LINES = 150
SERVERS = {"cloud-service": (9101, "/metrics"), "edge-agent run": (8080, "/healthz")}  # port and path that say it is up
NO_SERVER = ("--show-config", "--check", "--help", "--version")


def blocks(page: str) -> list[tuple[str, str]]:
    """(language, text) of each code block."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return [(kind, block) for kind, block in re.findall(r"^```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)]


def commands(page: str) -> list[str]:
    """Lines of its bash blocks without comments."""
    lines = (line for kind, block in blocks(page) if kind == "bash" for line in block.splitlines())
    return [line.split("  #")[0].strip() for line in lines if line]


def server(command: str) -> str | None:
    """Which server a command starts."""
    if any(option in command for option in NO_SERVER):
        return None
    return next((start for start in SERVERS if command.startswith(start)), None)


README = (ROOT / "README.md").read_text(encoding="utf-8")
CASES = [
    pytest.param(page, command, id=f"{Path(page).stem}: {command[:60]}")
    for page in PAGES
    for command in commands(page)
    if not server(command) and not command.startswith("make")
]


@dataclass(frozen=True)
class Place:
    """A folder that looks like the repository, where the servers of a page run on ports of their own."""

    folder: Path
    ports: Mapping[int, int]

    def renamed(self, text: str) -> str:
        for port, own in self.ports.items():
            text = text.replace(f":{port}", f":{own}")
        return text

    @property
    def environment(self) -> dict[str, str]:
        """Servers that name no port take theirs from here; what is fetched stays in the folder."""
        listen = {"CLOUD_LISTEN": 50051, "CLOUD_METRICS": 9101, "EDGE_LISTEN": 8080}
        servers = {f"ISTHMUS_{name}": f"127.0.0.1:{self.ports[port]}" for name, port in listen.items()}
        folders = {f"XDG_{name.upper()}_HOME": str(self.folder / name) for name in ("data", "cache")}
        return environment() | servers | folders

    def run(self, command: list[str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [self.renamed(part) for part in command],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=120,
        )


@contextmanager
def opened(page: str, folder: Path) -> Iterator[Place]:
    """The servers of a page."""
    for name in ("models", "docs"):
        (folder / name).symlink_to(ROOT / name)
    place = Place(folder, {port: free_port() for port in (50051, 9101, 8080)})
    processes = []
    try:
        for command in commands(page):
            if (name := server(command)) is not None:
                port, path = SERVERS[name]
                started = shlex.split(place.renamed(command))
                processes.append(subprocess.Popen(started, cwd=folder, env=place.environment))
                wait_for(f"http://127.0.0.1:{place.ports[port]}{path}")
        yield place
    finally:
        for process in processes:
            process.terminate()
            process.wait(30)


@pytest.fixture(scope="module")
def place_of(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Place]]:
    """A page's place, made when its first command comes; one at a time."""
    places: dict[str, Place] = {}
    with ExitStack() as stack:

        def place(page: str) -> Place:
            if page not in places:
                places.clear()
                stack.close()
                places[page] = stack.enter_context(opened(page, tmp_path_factory.mktemp("page")))
            return places[page]

        yield place


def environment() -> dict[str, str]:
    binaries = str(Path(sys.executable).parent)
    return {**os.environ, "PATH": binaries + os.pathsep + os.environ["PATH"], "PYTHONPATH": str(ROOT)}


def wait_for(url: str) -> None:
    for _ in range(600):
        try:
            with urllib.request.urlopen(url, timeout=1):
                return
        except OSError:
            time.sleep(0.1)
    raise AssertionError(f"{url} did not answer")


def test_python_snippet_runs(place_of: Callable[[str], Place]) -> None:
    (snippet,) = (block for kind, block in blocks("README.md") if kind == "python")
    result = place_of("README.md").run([sys.executable, "-c", snippet])
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.split()[0] in ("functional", "defective")


@pytest.mark.parametrize("snippet", [block for kind, block in blocks("docs/reference/python.md") if kind == "python"])
def test_snippets_of_the_python_page_run(place_of: Callable[[str], Place], snippet: str) -> None:
    result = place_of("README.md").run([sys.executable, "-c", snippet])
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.strip() and "True" not in result.stdout, "degraded"


@pytest.mark.parametrize(("page", "command"), CASES)
def test_command_runs(place_of: Callable[[str], Place], page: str, command: str) -> None:
    result = place_of(page).run(["bash", "-c", command])
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.strip() and not result.stdout.startswith('{"error"')
    assert "DEGRADED" not in result.stdout or "--cloud" not in command


def test_each_page_starts_what_its_commands_ask() -> None:
    for page in PAGES[:3]:
        assert [server(command) for command in commands(page) if server(command)] == list(SERVERS)


@pytest.mark.parametrize("target", sorted(set(re.findall(r"(?:`|^)make ([a-z-]+)", README, re.MULTILINE))))
def test_make_target_exists(target: str) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert target == "env" or re.search(rf"^{target}:.*##", makefile, re.MULTILINE)


def test_files_it_links_to_exist() -> None:
    for link in re.findall(r"\]\(((?!http)[^)]+)\)", README):
        assert (ROOT / link).exists(), link


def test_readme_is_short() -> None:
    assert len(README.splitlines()) <= MAX_README_LINES
