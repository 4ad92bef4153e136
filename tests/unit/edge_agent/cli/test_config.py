from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from isthmus.edge_agent.cli.main import main
from isthmus.edge_agent.cli.settings import KNOWN
from isthmus.edge_agent.config import PREFIX


def invoke(*arguments: str, **environment: str) -> Any:
    return CliRunner().invoke(main, ["config", *arguments], env=environment)


def test_it_checks_and_starts_nothing() -> None:
    assert invoke("--cloud", "nowhere:1").stdout == "ok: the settings are valid; --show prints them\n"


def test_it_shows_every_setting_of_every_command() -> None:
    assert json.loads(invoke("--json").stdout).keys() == KNOWN.keys()
    assert len(invoke("--show").stdout.splitlines()) == len(KNOWN)


def test_it_shows_where_each_value_comes_from(tmp_path: Path) -> None:
    path = tmp_path / "edge.toml"
    path.write_text('cloud = "a:1, b:1"\ndeadline_ms = 250\nmodel = "smollm2"\n')
    found = json.loads(invoke("--json", "--mode", "edge", "--config", str(path), ISTHMUS_EDGE_DEADLINE_MS="300").stdout)
    assert found["mode"] == {"value": "edge", "source": "--mode"}
    assert found["deadline_ms"] == {"value": 300.0, "source": "ISTHMUS_EDGE_DEADLINE_MS"}
    assert found["cloud"] == {"value": "a:1, b:1", "source": str(path)}
    assert found["epsilon"] == {"value": 0.005, "source": "default"}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("deadlin_ms = 3", "unknown key 'deadlin_ms', did you mean 'deadline_ms'?"),
        ("temperature = 3", "'temperature' in {path}: 3.0 is not in the range 0<=x<=2"),
        ("tls_key = '/nowhere'", "'tls_key' in {path}: File '/nowhere' does not exist"),
    ],
)
def test_a_wrong_file_ends_with_one_clear_line(tmp_path: Path, content: str, words: str) -> None:
    path = tmp_path / "edge.toml"
    path.write_text(content)
    result = invoke("--config", str(path))
    assert result.exit_code == 2
    assert words.format(path=path) in result.stderr.splitlines()[-1]


def test_every_setting_has_its_name_in_the_environment() -> None:
    params = {param.name: param for param in main.commands["config"].params}  # type: ignore[attr-defined]
    assert {key: params[key].envvar for key in KNOWN} == {key: f"{PREFIX}_{key.upper()}" for key in KNOWN}
