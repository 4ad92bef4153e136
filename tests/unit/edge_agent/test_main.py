from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from PIL import Image

from edge_agent.__main__ import main
from edge_agent.config import EdgeConfig
from models.bundle import Bundle


@pytest.fixture
def photos(tmp_path: Path, photo: Image.Image) -> tuple[str, str, str]:
    """Good, unreadable, good."""
    first, second, third = (tmp_path / name for name in ("a.png", "b.png", "c.jpg"))
    photo.save(first)
    second.write_bytes(b"no photo")
    photo.save(third)
    return str(first), str(second), str(third)


def invoke(*arguments: str, **environment: str) -> Any:
    return CliRunner().invoke(main, arguments, env=environment)


def test_one_unreadable_file_fails_alone(tiny_bundle: Bundle, photos: tuple[str, str, str]) -> None:
    result = invoke("infer", *photos, "--bundle", str(tiny_bundle.folder), "--json")
    assert result.exit_code == 1
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert [row["file"] for row in rows] == [photos[0], photos[2]]
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"error: {photos[1]}: not a readable")


def test_a_person_reads_label_place_time_and_reason(tiny_bundle: Bundle, photos: tuple[str, str, str]) -> None:
    result = invoke("infer", photos[0], "--bundle", str(tiny_bundle.folder), "--mode", "edge")
    assert result.exit_code == 0
    assert "on the device at exit1" in result.stdout
    assert "why: mode edge" in result.stdout
    assert " ms" in result.stdout


def test_settings_come_from_the_environment(tiny_bundle: Bundle, photos: tuple[str, str, str]) -> None:
    folder = str(tiny_bundle.folder)
    result = invoke("infer", photos[0], "--json", ISTHMUS_EDGE_BUNDLE=folder, ISTHMUS_EDGE_MODE="edge")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["why"] == "mode edge"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("infer", "x.png", "--bundle", "/nowhere"), "no such bundle folder"),
        (("infer", "x.png", "--mode", "sideways"), "sideways"),
        (("infer", "x.png", "--deadline-ms", "0"), "deadline-ms"),
        (("infer",), "FILES"),
        (("run", "--listen", "8080"), "HOST:PORT"),
        (("run", "--listen", "localhost:99999"), "HOST:PORT"),
        (("run", "--bundle", "/nowhere"), "no such bundle folder"),
    ],
)
def test_a_wrong_call_ends_with_one_clear_line(arguments: tuple[str, ...], words: str) -> None:
    result = invoke(*arguments)
    assert result.exit_code != 0
    assert words in result.stderr
    assert "Traceback" not in result.stderr
    assert result.exception is None or isinstance(result.exception, SystemExit)


@pytest.mark.parametrize("command", [(), ("infer",), ("run",)])
def test_help_has_an_example(command: tuple[str, ...]) -> None:
    result = invoke(*command, "--help")
    assert result.exit_code == 0
    assert "Example: edge-agent" in result.stdout


def test_command_line_and_config_have_the_same_defaults(tmp_path: Path) -> None:
    from edge_agent.__main__ import infer, to_config

    context = infer.make_context("infer", ["x.png"])
    context.params.pop("files")
    context.params.pop("as_json")
    made = to_config(**context.params)
    assert made == EdgeConfig(bundle=made.bundle)


def test_the_agent_imports_no_pytorch() -> None:
    code = "import edge_agent.api, edge_agent.__main__, sys; print(sys.modules.keys() & {'torch', 'compressai'})"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout.strip() == "set()"
