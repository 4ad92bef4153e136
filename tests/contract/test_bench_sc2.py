"""The SC2 comparison in its quick mode, on the bundle that ships: it runs, and its JSON has the promised shape."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from PIL import Image

from isthmus.models.bundle.files import read_manifest
from isthmus.models.vision.manifest import Manifest
from tests.bench.processes import ROOT

FIGURE = {"value", "low", "high", "undefined"}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.bench.sc2", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=170)


def test_quick_comparison_of_what_ships(tmp_path: Path) -> None:
    figures, picture = tmp_path / "sc2.json", tmp_path / "sc2.png"
    quick = ("--photos", "12", "--methods", "ours,jpeg", "--threads", "1", "--work", str(tmp_path / "work"))
    found = run(*quick, "--json", str(figures), "--plot", str(picture))
    assert found.returncode == 0, found.stderr[-2000:]
    assert "| ours |" in found.stdout and "| jpeg |" in found.stdout and "12 photos" in found.stdout
    result = json.loads(figures.read_text(encoding="utf-8"))
    manifest = read_manifest(ROOT / "models" / "zoo" / "elpv", Manifest)
    assert result["n"] == 12 and result["reference"] is None and result["bundle"] == manifest.fingerprint
    assert set(result["methods"]) == {"jpeg", "ours"} | {
        f"ours {tap.name}" + ("" if width.width == 1 else f" {width.width:g}")
        for index, tap in enumerate(manifest.taps)
        for width in tap.widths
        if index or width.width < 1
    }
    for name, method in result["methods"].items():
        assert set(method["bytes_at"]) == set(method["bd_rate"]) == {"accuracy", "agreement"}
        assert all(set(row["bytes"]) == FIGURE for row in method["bytes_at"]["agreement"][result["headline"]])
        for point in method["points"]:
            assert 0 < point["payload_bytes"] <= point["data_bytes"] and point["payload_bytes"] < point["wire_bytes"]
            assert point["agreement"]["samples"] == 12 and point["cloud_ms"] > point["decode_ms"]
            assert (point["encoder_kb"] == 0) == (point["encoder_macs"] == 0) == (name == "jpeg")
    with Image.open(picture) as image:
        assert image.format == "PNG" and image.width > 600


def test_a_method_without_training_is_one_line(tmp_path: Path) -> None:
    found = run("--methods", "n0", "--photos", "12", "--work", str(tmp_path))
    assert found.returncode == 1 and found.stdout == "" and found.stderr.count("\n") == 1
    assert found.stderr.startswith("error: no finished runs of n0")
    assert f"python -m isthmus.models.recipes baselines n0 --work {tmp_path}" in found.stderr


def test_help_has_an_example() -> None:
    assert "Example: python -m tests.bench.sc2" in run("--help").stdout
