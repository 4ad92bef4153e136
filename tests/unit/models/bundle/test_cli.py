from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from isthmus.models.bundle.cli import WINGS, main
from isthmus.models.vision.bundle import Bundle
from isthmus.models.vision.inspect import summary
from tests.conftest import ROOT, Parts


def command(*words: str | Path) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def test_verify_names_files_bytes_and_fingerprint(paper: Parts, tmp_path: Path) -> None:
    folder = paper.write(tmp_path / "b")
    done = command("verify", folder)
    size = sum(map(len, paper.files.values()))
    assert done.exit_code == 0
    assert done.stdout == f"ok: {folder}: 4 files, {size} bytes, {Bundle.open(folder).fingerprint.hex()}\n"


def test_verify_writes_json(paper: Parts, tmp_path: Path) -> None:
    result = json.loads(command("verify", paper.write(tmp_path / "b"), "--json").stdout)
    assert result["ok"] is True
    assert result["name"] == "paper"


def test_inspect_as_json_is_the_manifest(paper: Parts, tmp_path: Path) -> None:
    folder = paper.write(tmp_path / "b")
    shown = json.loads(command("inspect", folder, "--json").stdout)
    assert shown == json.loads((folder / "manifest.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("verb", ["inspect", "verify"])
def test_a_broken_bundle_ends_with_one_line_and_code_1(paper: Parts, tmp_path: Path, verb: str) -> None:
    (paper.write(tmp_path / "b") / "head0.onnx").write_bytes(b"?")
    done = command(verb, tmp_path / "b")
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


def test_inspect_prints_the_summary_of_the_wing(paper: Parts, tmp_path: Path) -> None:
    folder = paper.write(tmp_path / "b")
    assert command("inspect", folder).stdout == "\n".join(summary(Bundle.open(folder).manifest)) + "\n"


def test_a_handoff_bundle_is_known_by_its_kind() -> None:
    done = command("inspect", ROOT / "models" / "zoo" / "smollm2-25")
    assert done.exit_code == 0 and "exits and hidden states of the model" in done.stdout


@pytest.mark.parametrize("kind", ["other", None, ["handoff"]])
def test_an_unknown_kind_is_refused(paper: Parts, tmp_path: Path, kind: Any) -> None:
    folder = paper.tamper(tmp_path / "b", lambda content: content.update(kind=kind))
    done = command("verify", folder)
    assert done.exit_code == 1 and "kind: Extra inputs are not permitted" in done.stderr


def test_every_wing_is_a_module_that_verifies_and_summarises() -> None:
    for name in WINGS.values():
        wing = importlib.import_module(name)
        assert callable(wing.verify) and callable(wing.summary)


def test_the_command_line_imports_no_wing() -> None:
    program = (
        "import sys, isthmus.models.bundle.cli;"
        "sys.exit(any(name.startswith(('isthmus.models.vision', 'isthmus.models.language')) for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_a_forgotten_argument_is_a_usage_error() -> None:
    assert command("verify").exit_code == 2


@pytest.mark.parametrize("words", [("--help",), ("inspect", "--help"), ("verify", "--help")])
def test_help_has_an_example(words: tuple[str, ...]) -> None:
    assert "Example: python -m isthmus.models.bundle" in command(*words).stdout
