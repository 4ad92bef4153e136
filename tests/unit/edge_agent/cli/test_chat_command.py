from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from isthmus.edge_agent.cli.main import main
from tests.bench.tiny_llama import without_template, write_tiny_llama


def invoke(*arguments: str, **environment: str) -> Any:
    return CliRunner().invoke(main, arguments, env=environment)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tiny_llama(tmp_path_factory.mktemp("models") / "tiny", scale=0.3))


def test_a_chat_of_lines_with_a_model_on_the_device(model: str) -> None:
    arguments = ["chat", "--model", model, "--json", "--max-tokens", "4", "--threads", "1"]
    result = CliRunner().invoke(main, arguments, input="hi\n\nand you\n")
    assert result.exit_code == 0, result.stderr
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(rows) == 2
    for row in rows:
        assert row["arm"] == "edge" and not row["degraded"]
        assert row["made"] == {"edge": row["tokens"], "draft": 0, "cloud": 0} and 1 <= row["tokens"] <= 4


def test_a_chat_of_which_an_answer_failed_says_so(model: str) -> None:
    arguments = ["chat", "--model", model, "--json", "--max-tokens", "4", "--threads", "1", "--context", "80"]
    result = CliRunner().invoke(main, arguments, input="far too long " * 20 + "\nhi\n")
    assert result.exit_code == 1
    assert len(result.stdout.splitlines()) == 2


def test_a_model_without_a_chat_template_is_refused_at_the_start(tmp_path: Path) -> None:
    folder = without_template(write_tiny_llama(tmp_path / "plain"))
    result = CliRunner().invoke(main, ["chat", "--model", str(folder), "--threads", "1"], input="hi\n")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("error: plain has no chat template") and result.stderr.count("\n") == 1
