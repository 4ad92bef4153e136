"""The demo and the benchmarks in their quick mode: they run, and their JSON has the promised shape."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from isthmus.models.language.checkpoint.checkpoint import Checkpoint
from tests.bench.handoff import OTHER_TOKENS
from tests.bench.processes import ROOT
from tests.tiny_handoff import write_tiny_handoff
from tests.tiny_router import write_tiny_router

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
    assert sum(result["arms"]["isthmus"]["points"].values()) <= 8 and not result["arms"]["offload_jpeg75"]["points"]
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
        assert row["bytes"] <= 1.01 * row["ideal_bytes"] + 4
        assert row["same_tables_bytes"] == pytest.approx(row["bytes"], rel=0.05, abs=16)
        assert row["compressai_bytes"] > 0  # its own tables, fitted to the very photos


def test_footprint_quick(tmp_path: Path) -> None:
    figures = tmp_path / "footprint.json"
    run("tests.bench.footprint", "--python", sys.executable, "--repeats", "1", "--json", str(figures))
    result = json.loads(figures.read_text(encoding="utf-8"))
    seconds = {"first_answer_s", "first_answer_torch_s", "first_answer_ratio_vs_torch", "int8_over_fp32_time"}
    assert all(result[key] > 0 for key in seconds | {"rss_mb", "rss_torch_mb"})
    assert result["install_mb"] > 100, "this environment has PyTorch too"


def test_handoff_benchmark_quick(tmp_path: Path, tiny_llama: Path) -> None:
    bundle = write_tiny_handoff(tmp_path / "bundle", Checkpoint.open(tiny_llama))
    prompts, other, figures = tmp_path / "prompts.jsonl", tmp_path / "other.txt", tmp_path / "handoff.json"
    prompts.write_text("".join(json.dumps({"turns": [f"What is {word}?"]}) + "\n" for word in ("rain", "a bridge")))
    other.write_text("A river runs to the sea, and a bridge crosses it. " * 40)
    settings = (
        "--model", str(tiny_llama), "--bundle", str(bundle), "--every", "1", "--passages", "2", "--point", "1",
        "--prompt-tokens", "200",
    )  # fmt: skip
    files = ("--prompts", str(prompts), "--other", str(other), "--work", str(tmp_path), "--json", str(figures))
    printed = run("tests.bench.handoff", *settings, *files, "--plot", str(tmp_path / "handoff.png"))
    assert "NaN" not in figures.read_text(encoding="utf-8"), "where no exit is sure of a token, none is wrong"
    result = json.loads(figures.read_text(encoding="utf-8"))["bundles"]["bundle"]
    assert result["answers"] == 2 and result["positions"] > 20
    assert [row["point"] for row in result["points"]] == [0, 1]
    assert result["points"][0]["bytes"] < result["points"][1]["bytes"] < 160
    (prefill,) = result["prefill"]["rows"]
    assert (prefill["kept"], prefill["prompts"]) == (1, 2) and prefill["time_ratio"] > 0
    assert (
        prefill["positions"] == 2 * OTHER_TOKENS and prefill["prompt_tokens"] == 200 and 0 <= prefill["agreement"] <= 1
    )
    for scheme, rows in result["curves"].items():
        coverages = [row["coverage"] for row in rows]
        assert coverages == sorted(coverages, reverse=True), f"{scheme}: the surer, the fewer"
        assert all(0 < row["cloud, exact"] <= 1 for row in rows)
    assert result["curves"].keys() == {"ours", "CE-CoLLM"} and "KV fill of 200 tokens" in printed


def test_lossless_benchmark_quick(tmp_path: Path, tiny_llama: Path) -> None:
    figures = tmp_path / "lossless.json"
    settings = ("--dtype", "float32", "--n", "10", "--tokens", "12", "--restarts", "1")
    run("tests.bench.lossless", "--model", str(tiny_llama), *settings, "--json", str(figures))
    result = json.loads(figures.read_text(encoding="utf-8"))
    assert (result["prompts"], result["mismatches"], result["restarts"]) == (10, 0, 1)
    assert 10 < result["tokens"] <= 10 * 12
    assert result["bytes_per_round"] > 0 and 0 < result["cloud_passes_per_token"] <= 1
    by_draft = result["by_draft"]
    assert {"model-8bit", "model-4bit", "lookup", "random", "wrong", "right"} <= set(by_draft)
    assert sum(row["tokens"] for row in by_draft.values()) == result["tokens"]
    assert by_draft["wrong"]["acceptance"] == 0 and by_draft["right"]["acceptance"] == 1
    assert list(tmp_path.iterdir()) == [figures], "what was kept for an interruption is gone"


def test_device_benchmark_quick(tmp_path: Path, tiny_llama: Path) -> None:
    figures = tmp_path / "device.json"
    settings = ("--device", "cpu", "--dtype", "float32", "--tokens", "12", "--total", "100", "--context-mb", "64")
    run("tests.bench.device", "--model", str(tiny_llama), *settings, "--json", str(figures))
    result = json.loads(figures.read_text(encoding="utf-8"))
    assert (result["mismatches"], result["sessions"], result["card"]) == (0, 16, "the CPU")
    assert 100 <= result["tokens"] <= 12 * result["answers"] and result["accepted"] > 0 < result["rejected"]
    assert result["tokens_per_s"] > 0 < result["tokens_per_s_alone"]
    assert 1 < result["rows_per_pass"] <= 16, "sessions share forward passes"


def test_language_benchmark_quick(tmp_path: Path, tiny_llama: Path) -> None:
    figures, picture = tmp_path / "language.json", tmp_path / "language.png"
    bundle = write_tiny_handoff(tmp_path / "bundle", Checkpoint.open(tiny_llama))
    arguments = ("--model", str(tiny_llama), "--handoff", str(bundle), "--quick", "--json", str(figures))
    printed = run("tests.bench.language", *arguments, "--plot", str(picture))
    result = json.loads(figures.read_text(encoding="utf-8"))
    assert result["settings"]["rtts_ms"] == [20]
    rows = {row["method"]: row for row in result["rows"]}
    assert len(rows) == len(result["rows"]) == 11
    for name, row in rows.items():
        assert {"rtt_ms", "slowdown", "bytes_up_per_token", "bytes_down_per_token", "bytes_per_round", "why"} <= set(
            row
        )
        assert {"cloud_gflops_per_token", "acceptance", "tokens_per_s_after_first"} <= set(row)
        assert row["tokens_per_s"] > 0 and 2 < row["tokens"] <= 24
        alone = name.startswith("edge") or (row["device_share"] == 1 and not row["cloud_passes_per_token"])
        assert (row["bytes_up_per_token"] == 0) == alone and (row["cloud_passes_per_token"] == 0) == alone
        own = alone or name.startswith(("handoff", "auto"))  # may begin by itself
        assert own or row["first_token_ms"] >= 20, "the emulated round trip is part of it"
    assert rows["cloud"]["tokens"] == rows["verify, 8-bit copy"]["tokens"] == rows["auto-q1"]["tokens"]
    assert rows["cloud"]["agreement"] == rows["verify, 8-bit copy"]["agreement"] == rows["auto-q1"]["agreement"] == 1
    assert rows["cloud"]["perplexity"] > 1
    assert picture.stat().st_size > 10_000 and "verif" in printed


def test_decoder_benchmark_quick(tmp_path: Path, tiny_llama: Path) -> None:
    """Without llama.cpp, which is not among the dependencies."""
    figures = tmp_path / "decoder.json"
    run("tests.bench.decoder", "--model", str(tiny_llama), "--quick", "--threads", "1", "--json", str(figures))
    result = json.loads(figures.read_text(encoding="utf-8"))
    assert result["model"] == tiny_llama.name and result["turns"] == 2
    assert result["tokens_per_s"] > 0 and result["ratio_to_transformers"] > 0 and result["ratio_to_llamacpp"] is None
    eight, four = (result["agreement"][name] for name in ("8-bit", "4-bit"))
    assert eight["value"] > 0.8 and four["value"] < eight["value"], "8 bits keep more of a random model than 4"
    for row in (eight, four):
        assert row["low"] <= row["value"] <= row["high"] and row["samples"] == 256
    assert set(result["decode_tokens_per_s"]) == set(result["prefill_tokens_per_s"])


def test_routing_benchmark(tmp_path: Path, tiny_llama: Path) -> None:
    figures, picture, prompts = tmp_path / "routing.json", tmp_path / "routing.png", tmp_path / "prompts.jsonl"
    bundle = write_tiny_router(tmp_path / "bundle", Checkpoint.open(tiny_llama))
    prompts.write_text("".join(json.dumps({"turns": [f"What is {word}?"]}) + "\n" for word in range(40)))
    models = ("--device", str(tiny_llama), "--cloud", str(tiny_llama))
    arguments = (*models, "--router", str(bundle), "--prompts", str(prompts))
    work = ("--work", str(tmp_path / "work"), "--resamples", "20", "--closed-loop", "1")
    printed = run("tests.bench.routing", *arguments, *work, "--json", str(figures), "--plot", str(picture))
    result = json.loads(figures.read_text(encoding="utf-8"))
    found = result["pairs"]["tiny-router"]
    assert found["answers"] == 32 and found["tokens"] > 100
    routers = found["routers"]
    assert routers["oracle"]["apgr"] >= max(row["apgr"] for row in routers.values())
    for row in routers.values():
        assert row["curve"][0] == [0.0, found["device_alone"]] and row["curve"][-1] == [1.0, 1.0]
        low, high = row["intervals"]["apgr"]
        assert low <= high and 0 <= row["cpt50"] <= row["cpt80"] <= 1 >= row["saved_at_no_loss"] >= 0
    assert found["apgr_above"].keys() == routers.keys() - {"confidence head (ours)"}
    assert all(0 < row["cloud"] <= 1 for row in found["dial"])
    assert [row["quality"] for row in found["dial"]] == [0.9, 0.95, 0.97, 0.98, 0.99, 0.995, 0.999]
    unkept = found["dial"][1:]
    assert all(row["asked"] == 1 and row["agreement"] == 1 for row in unkept), "the tiny bundle promises 0.9"
    (looped,) = found["closed_loop"]
    assert looped["quality"] == 0.9 and looped["wrong"]["samples"] == 1
    assert [row["quality"] for row in found["certificates"]] == [row["quality"] for row in found["dial"]]
    assert picture.stat().st_size > 10_000 and "CPT(50)" in printed


def test_engines_benchmark_quick(tmp_path: Path) -> None:
    """A scripted engine is killed in between; nothing of an answer is lost or changed."""
    figures = tmp_path / "engines.json"
    quick = ("--n", "4", "--tokens", "8", "--pairs", "2", "--restarts", "1")
    run("tests.bench.engines", "--only", "speed", "--only", "lossless", *quick, "--json", str(figures))
    result = json.loads(figures.read_text(encoding="utf-8"))
    lossless, speed = result["lossless"], result["speed"]
    assert (lossless["prompts"], lossless["lost"], lossless["mismatches"], lossless["restarts"]) == (4, 0, 0, 1)
    assert lossless["tokens"] > 0 and speed["prompts"] == 2
    for ratio in (speed["tokens_per_s_ratio"], speed["first_token_ratio"]):
        assert 0 < ratio["low"] <= ratio["median"] <= ratio["high"]


def test_student_benchmark(tmp_path: Path, tiny_llama: Path) -> None:
    figures, models = tmp_path / "student.json", ("--student", str(tiny_llama), "--teacher", str(tiny_llama))
    run("tests.bench.student", *models, "--threads", "1", "--turns", "2", "--tokens", "8", "--json", str(figures))
    result = json.loads(figures.read_text(encoding="utf-8"))
    assert result["ratio"] > 0 and result["tokens"] == 16
    assert result["layers"]["student"] == result["layers"]["teacher"] and result["bytes"]["student"] > 100_000


MODULES = [
    "demo",
    "demo_video",
    "device",
    "codec",
    "lossless",
    "language",
    "decoder",
    "routing",
    "engines",
    "device_memory",
    "student",
]


@pytest.mark.parametrize("module", [f"tests.bench.{name}" for name in MODULES])
def test_help_has_an_example(module: str) -> None:
    assert f"Example: python -m {module}" in run(module, "--help")
