"""Start and memory of the device's own model: graphs built or kept, KV caches of 32 or 8 bits.

Each row is new processes in turn. `start_s`: from an open checkpoint to the first token. `started_mb` and `peak_mb`:
resident memory of the process then, and at most. `caches_mb`: what four full KV caches add to it.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import click

from tests.bench.processes import ROOT

ROWS = (("built", 32), ("kept", 32), ("built", 8), ("kept", 8))
START = """
import json, sys, time
from pathlib import Path
from isthmus.edge_agent.config import LanguageConfig
from isthmus.edge_agent.language.device_model import DeviceModel
from isthmus.edge_agent.policy.speculation import SpeculationStats

def memory(key):
    fields = dict(line.split(":") for line in open("/proc/self/status"))
    return int(fields[key].split()[0]) / 1024

model, how, kv_bits, context, folder = sys.argv[1:]
config = LanguageConfig(model, keep_graphs=how == "kept", kv_bits=int(kv_bits), context=int(context),
                        graphs=Path(folder), threads=1, max_answers=2)
opened = DeviceModel(config, model)
started_s = time.perf_counter()
local = opened.start(SpeculationStats())
row = {"start_s": time.perf_counter() - started_s, "started_mb": memory("VmRSS"), "peak_mb": memory("VmHWM")}
text = [100] * (opened.context - 1)
for first in range(4):
    local.session().logits([first, *text])
print(json.dumps({**row, "caches_mb": memory("VmRSS") - row["started_mb"]}))
"""


def measure(model: str, context: int, runs: int, folder: Path) -> list[dict[str, Any]]:
    """A row for each of ROWS: medians of `runs` new processes, after one that fills the folder."""
    measured: dict[tuple[str, int], list[dict[str, float]]] = {row: [] for row in ROWS}
    for run in range(runs + 1):
        for how, kv_bits in ROWS:
            command = [sys.executable, "-c", START, model, how, str(kv_bits), str(context), str(folder)]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
            if run:
                measured[how, kv_bits].append(json.loads(done.stdout))
    return [
        {"graphs": how, "kv_bits": kv_bits, "context": context, "runs": runs}
        | {key: statistics.median(each[key] for each in rows) for key in rows[0]}
        for (how, kv_bits), rows in measured.items()
    ]


@click.command(epilog="Example: python -m tests.bench.device_start --json runs/device_start.json")
@click.option("--model", default="smollm2", show_default=True)
@click.option("--context", default=2048, show_default=True, type=click.IntRange(16))
@click.option("--runs", default=3, type=click.IntRange(1), show_default=True, help="New processes for each row.")
@click.option("--json", "json_file", type=click.Path(path_type=Path))
def main(model: str, context: int, runs: int, json_file: Path | None) -> None:
    """Measure the start and the memory of the device's model."""
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(model, context, runs, Path(folder) / "graphs")
    for row in rows:
        click.echo(
            f"graphs {row['graphs']:<5}, {row['kv_bits']:2}-bit caches: {row['start_s']:5.1f} s,"
            f" {row['started_mb']:5.0f} MB, {row['peak_mb']:5.0f} MB at most,"
            f" four full caches {row['caches_mb']:5.0f} MB"
        )
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
