from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.numpy
from click.testing import CliRunner, Result

from isthmus.models.bundle import bundle as bundles
from isthmus.models.bundle.bundle import Bundle
from isthmus.models.bundle.cli import main
from isthmus.models.vision.manifest import Manifest
from tests.conftest import Parts, paper_tables


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


def test_inspect_shows_what_a_person_asks_for(paper: Parts, tmp_path: Path) -> None:
    shown = command("inspect", paper.write(tmp_path / "b")).stdout
    for words in ("Apache-2.0", "8x8 RGB", "exit0", "loss <= 1.0% with confidence 90%", "0.7500 [0.5000"):
        assert words in shown
    assert "task defect: good, bäd" in shown
    assert "tap deep: behind segment 0, latent 2x4x4, at most 64 B" in shown


def test_inspect_has_a_row_for_each_width_and_rate(tiny_bundle: Bundle) -> None:
    shown = command("inspect", tiny_bundle.folder).stdout
    assert "tiny: defect, colour" in shown and "task colour: red, green, blue" in shown
    light, deep = shown[shown.index("tap light: of the image") :].split("tap deep: behind segment 1")
    rows = [line.split() for line in light.splitlines() if line.startswith("    ")]
    assert rows[0] == ["width", "encoder", "MMAC", "rate", "mean", "B", "max", "B", "accuracy", "agreement"]
    assert [row[:3] for row in rows[1:]] == [[w, m, r] for w, m in (("0.5", "4.0"), ("1", "8.0")) for r in "012"]
    assert rows[1][3:] == ["40", "200", "0.800", "0.940"]
    assert [line.split()[2] for line in deep.splitlines() if line.startswith("     ")] == ["0", "1"]


def test_inspect_does_not_print_a_hundred_thousand_labels(paper: Parts, tmp_path: Path) -> None:
    paper.manifest["tasks"] = [{"name": "plants", "labels": [f"plant{number}" for number in range(12)]}]
    paper.manifest["architecture"]["classes"] = [12]
    shown = command("inspect", paper.write(tmp_path / "b")).stdout
    assert "plant9 and 2 more" in shown and "plant10" not in shown


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


def test_verify_looks_into_the_tables(paper: Parts, tmp_path: Path) -> None:
    tensors = paper_tables()
    tensors["frequencies"][0] += 1
    paper.replace(tmp_path / "b", "tables.safetensors", safetensors.numpy.save(tensors))
    assert command("verify", tmp_path / "b").exit_code == 1


def test_verify_looks_into_the_tables_of_every_tap(tiny_bundle: Bundle, tmp_path: Path) -> None:
    files = {name: tiny_bundle.read(name) for name in tiny_bundle.manifest.files}
    files["deep.safetensors"] = files["light.safetensors"]
    content = tiny_bundle.manifest.model_dump(mode="json", exclude={"files", "fingerprint", "schema_version"})
    done = command("verify", bundles.write(tmp_path / "b", content, files, Manifest))
    assert done.exit_code == 1 and "rates, expected 2" in done.stderr


def test_a_forgotten_argument_is_a_usage_error() -> None:
    assert command("verify").exit_code == 2


@pytest.mark.parametrize("words", [("--help",), ("inspect", "--help"), ("verify", "--help")])
def test_help_has_an_example(words: tuple[str, ...]) -> None:
    assert "Example: python -m isthmus.models.bundle" in command(*words).stdout
