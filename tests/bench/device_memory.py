"""Resident memory of an agent beside clouds whose models differ in size: it must not depend on them.

A cloud process for each size, with random weights and one tokenizer; each answers a new agent process, that holds no
model or a small one. The agent's process reports its own memory after its answers.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import click

from tests.bench.processes import ROOT, CloudProcess
from tests.bench.tiny_llama import write_tiny_llama

SIZES: dict[str, dict[str, int]] = {  # of the clouds' models; hidden a multiple of 64, as heads have 64 values
    "small": {"hidden": 64, "layers": 2, "ffn": 128, "heads": 1, "kv_heads": 1},
    "large": {"hidden": 1024, "layers": 16, "ffn": 2816, "heads": 16, "kv_heads": 4},
}
ANSWERS, TOKENS = 3, 16
AGENT = """
import json, sys
from isthmus.edge_agent import LanguageAgent, LanguageConfig
model, target, answers, tokens = sys.argv[1] or None, sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
with LanguageAgent(LanguageConfig(model, (target,), threads=1, connect_s=60)) as agent:
    for arm in ("auto", "cloud", *(("verify",) if model else ())):
        for _ in range(answers):
            agent.answer("What is a bridge?", arm=arm, max_tokens=tokens)
    fields = dict(line.split(":") for line in open("/proc/self/status"))
    print(json.dumps({name: int(fields[key].split()[0]) / 1024 for name, key in
                      (("rss_mb", "VmRSS"), ("peak_mb", "VmHWM"))} | {"arms": agent.arms()}))
"""


def agent_memory(target: str, model: str, cache: Path) -> dict[str, Any]:
    """Memory in MB of a new agent after its answers, without a model of its own if `model` is empty."""
    command = [sys.executable, "-c", AGENT, model, target, str(ANSWERS), str(TOKENS)]
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True, timeout=300)
    measured: dict[str, Any] = json.loads(done.stdout)
    return measured


def measure(folder: Path, runs: int = 3, sizes: dict[str, dict[str, int]] = SIZES) -> list[dict[str, Any]]:
    """A row for each size of the cloud's model, and each device: the median of `runs` new agents."""
    device = str(write_tiny_llama(folder / "device", vocab="smollm2", seed=9, scale=0.05))
    rows = []
    for name, size in sizes.items():
        model = write_tiny_llama(folder / name, vocab="smollm2", scale=0.05, **size)  # type: ignore[arg-type]
        weights_mb = sum(file.stat().st_size for file in model.glob("*.safetensors")) / 1e6
        with CloudProcess(arguments=("--model", str(model), "--threads", "1")) as cloud:
            for kind, own in (("no model", ""), ("a small model", device)):
                measured = [agent_memory(cloud.target, own, folder / "cache") for _ in range(runs)]
                medians = {key: statistics.median(each[key] for each in measured) for key in ("rss_mb", "peak_mb")}
                rows.append({"cloud_model_mb": weights_mb, "device": kind, "runs": runs, **medians})
    return rows


@click.command(epilog="Example: python -m tests.bench.device_memory --json runs/device_memory.json")
@click.option("--runs", default=3, type=click.IntRange(1), show_default=True, help="New agents for each row.")
@click.option("--json", "json_file", type=click.Path(path_type=Path))
def main(runs: int, json_file: Path | None) -> None:
    """Measure the agent's memory beside a small and a large model in the cloud."""
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Path(folder), runs)
    for row in rows:
        click.echo(
            f"cloud's model {row['cloud_model_mb']:7.1f} MB, {row['device']:<13} on the device:"
            f" {row['rss_mb']:6.1f} MB resident, {row['peak_mb']:6.1f} MB at most"
        )
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
