"""The demo and the benchmarks in their quick mode: they run, and their JSON has the promised shape."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.bench.processes import ROOT

ARMS = ["edge_only", "offload_jpeg75", "offload_webp75", "isthmus"]


def run(*arguments: str) -> str:
    result = subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=170)
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


def test_demo_writes_table_figures_and_picture(tmp_path: Path) -> None:
    figures, picture = tmp_path / "demo.json", tmp_path / "demo.png"
    printed = run("tests.bench.demo", "--photos", "8", "--json", str(figures), "--plot", str(picture))
    result = json.loads(figures.read_text(encoding="utf-8"))
    assert result["n"] == 8 and result["link"] == {"mbit": 2.0, "rtt_ms": 40.0}
    assert list(result["arms"]) == ARMS
    for row in result["arms"].values():
        assert {"accuracy", "agreement", "bytes_up_per_image", "bytes_up_per_upload", "cloud_share", "cost"} <= set(row)
        assert {"mean", "p50", "p99"} == set(row["latency_ms"])
        assert row["degraded"] == 0
    assert result["arms"]["edge_only"]["bytes_up_per_image"] == 0
    assert result["arms"]["offload_jpeg75"]["cloud_share"] == 1
    for name in ARMS[1:3]:  # the link carries at least what the messages hold
        assert result["arms"][name]["wire_bytes_up_per_image"] > result["arms"][name]["bytes_up_per_image"] > 1000
    assert result["arms"]["isthmus"]["bytes_up_per_image"] < result["arms"]["offload_webp75"]["bytes_up_per_image"]
    with Image.open(picture) as image:
        assert image.format == "PNG" and image.width > 600
    assert "Isthmus" in printed and "accuracy" in printed


def test_codec_benchmark_quick(tmp_path: Path) -> None:
    figures = tmp_path / "codec.json"
    run("tests.bench.codec", "--photos", "3", "--json", str(figures))
    result = json.loads(figures.read_text(encoding="utf-8"))
    assert result["speedup_vs_compressai"] > 0
    for row in result["rates"]:
        assert row["bytes"] <= 1.02 * row["ideal_bytes"] + 32
        assert row["compressai_bytes"] == pytest.approx(row["bytes"], rel=0.05, abs=16)


@pytest.mark.parametrize("module", ["tests.bench.demo", "tests.bench.codec"])
def test_help_has_an_example(module: str) -> None:
    assert f"Example: python -m {module}" in run(module, "--help")
