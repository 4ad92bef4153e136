"""A student beside its teacher on the device: decoding speed, turn by turn, and bytes on disk.

`ratio`: the median time of the teacher's tokens over the median time of the student's. How many of the teacher's greedy
tokens the student chooses is a score of its bundle.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path

import click

from isthmus.models.language.checkpoint.checkpoint import Checkpoint, path_of
from isthmus.models.language.onnx.decoder import OnnxDecoder
from tests.bench.decoder import TEXT


def token_times(decoder: OnnxDecoder, ids: list[int], tokens: int) -> list[float]:
    """Seconds of each of `tokens` greedy tokens after a prompt."""
    decoder.truncate(0)
    logits_V, times = decoder.extend(ids), []
    for _ in range(tokens):
        started_s = time.perf_counter()
        logits_V = decoder.extend([int(logits_V.argmax())])
        times.append(time.perf_counter() - started_s)
    return times


def disk_bytes(source: str) -> int:
    path = path_of(source)
    return sum(file.stat().st_size for file in ([path] if path.is_file() else path.iterdir()))


@click.command(epilog="Example: python -m tests.bench.student --student student --json runs/student.json")
@click.option("--json", "json_file", type=click.Path(path_type=Path), required=True)
@click.option("--student", default="student", show_default=True, help="Bundle, or the name of an installed one.")
@click.option("--teacher", default="smollm2", show_default=True, help="Its weights are quantised to 8 bits.")
@click.option("--threads", default=os.cpu_count() or 1, show_default=True)
@click.option("--tokens", default=64, show_default=True, help="Decoded in each turn.")
@click.option("--turns", default=7, show_default=True)
def main(json_file: Path, student: str, teacher: str, threads: int, tokens: int, turns: int) -> None:
    """Measure both models turn by turn, and print medians."""
    sources = {"student": student, "teacher": teacher}
    checkpoints = {name: Checkpoint.open(source) for name, source in sources.items()}
    decoders = {name: OnnxDecoder(each, 1024, 8, threads) for name, each in checkpoints.items()}
    ids = checkpoints["teacher"].tokenizer.encode(TEXT)
    times: dict[str, list[float]] = {name: [] for name in sources}
    for turn in range(turns + 1):
        for name, decoder in decoders.items():
            found = token_times(decoder, ids, tokens)
            times[name] += found if turn else []  # the first warms up
        print(f"turn {turn} of {turns}", file=sys.stderr)
    medians = {name: statistics.median(each) for name, each in times.items()}
    result = {
        "ratio": medians["teacher"] / medians["student"],
        "median_token_ms": {name: 1e3 * each for name, each in medians.items()},
        "bytes": {name: disk_bytes(source) for name, source in sources.items()},
        "layers": {name: each.config.layers for name, each in checkpoints.items()},
        "tokens": turns * tokens,
        "threads": threads,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }
    json_file.parent.mkdir(parents=True, exist_ok=True)
    json_file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    click.echo(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
