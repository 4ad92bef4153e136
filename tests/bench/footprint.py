"""The footprint of vision on a device: disk, memory, and the time from process start to the first answer.

The edge is installed as users install it, with `pip install '.[edge]'` into a new environment, and measured there.
`first_answer_ratio_vs_torch` is the time of the same answer by the same exits in PyTorch, in this environment, over
ours; both start as new processes, in turn, and answer one photo. `int8_over_fp32_time` is the time of all segments of
the head at both precisions, in turn, on one thread. All figures are medians.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

from isthmus.models.errors import IsthmusError
from isthmus.models.recipes.vision.elpv_data import load
from isthmus.models.vision.bundle import Bundle
from isthmus.models.vision.head import Head
from isthmus.models.vision.images import open_image, preprocess
from tests.bench.processes import ROOT

TORCH = "tests.bench.torch_device"
HEAD_RUNS = 10  # per repeat

Floats = NDArray[np.float32]


def install(folder: Path) -> Path:
    """A new environment with the edge alone; returns its interpreter. Raises OSError when pip fails."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--disable-pip-version-check"]
    run = subprocess.run([*pip, "-c", "constraints.txt", ".[edge]"], cwd=ROOT, capture_output=True, text=True)
    if run.returncode:
        raise OSError(f"pip install .[edge] failed: {run.stderr.strip().splitlines()[-1]}")
    return python


def megabytes(folder: Path) -> float:
    """Total size of the files below a folder."""
    return sum(path.lstat().st_size for path in folder.rglob("*") if not path.is_dir()) / 1e6


def first_answer(command: list[str]) -> tuple[float, float]:
    """Seconds from the start of a process to its first line of output, and its peak resident memory in MB.

    Raises OSError if the process fails.
    """
    environment = {**os.environ, "PYTHONPATH": ""}
    started_s = time.perf_counter()
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        line = process.stdout.readline()
        answer_s = time.perf_counter() - started_s
        process.stdout.read()
        problems = process.stderr.read().decode()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode or not line:
        raise OSError(f"{' '.join(command[:3])} failed: {problems.strip().splitlines()[-1:]}")
    return answer_s, usage.ru_maxrss / 1000


def footprint(bundle: Path, python: Path, photo: Path, repeats: int) -> dict[str, Any]:
    """What `--json` writes, except the size of the installation."""
    edge = [str(python.parent / "edge-agent"), "infer", str(photo), "--bundle", str(bundle), "--json"]
    torch = [sys.executable, "-m", TORCH, str(photo), str(bundle)]
    first_answer(edge)  # fills the file cache, as on a machine in use
    first_answer(torch)
    pairs = [(first_answer(edge), first_answer(torch)) for _ in range(repeats)]
    return {
        "first_answer_s": statistics.median(edge_s for (edge_s, _), _ in pairs),
        "first_answer_torch_s": statistics.median(torch_s for _, (torch_s, _) in pairs),
        "first_answer_ratio_vs_torch": statistics.median(torch_s / edge_s for (edge_s, _), (torch_s, _) in pairs),
        "rss_mb": statistics.median(rss for (_, rss), _ in pairs),
        "rss_torch_mb": statistics.median(rss for _, (_, rss) in pairs),
    }


def head_s(head: Head, image_CHW: Floats) -> float:
    """Seconds of one run of all segments."""
    started_s = time.perf_counter()
    for index in range(head.exits):
        image_CHW, _ = head.segment(index, image_CHW)
    return time.perf_counter() - started_s


def int8_over_fp32(opened: Bundle, photos: Sequence[Path]) -> float:
    """Median over photos of the int8 head's time over the float head's."""
    images = [preprocess(open_image(photo.read_bytes()), opened.manifest.preprocessing) for photo in photos]
    fp32, int8 = Head(opened, 1), Head(opened, 1, "int8")
    pairs = [(head_s(int8, image_CHW), head_s(fp32, image_CHW)) for image_CHW in (images[0], *images)]
    return statistics.median(int8_s / fp32_s for int8_s, fp32_s in pairs[1:])


@click.command(epilog="Example: python -m tests.bench.footprint --json runs/footprint.json")
@click.option("--bundle", default=ROOT / "models" / "zoo" / "elpv", type=click.Path(path_type=Path))
@click.option(
    "--python",
    type=click.Path(path_type=Path),
    help="Interpreter of an environment that has the edge; by default a new one is made.",
)
@click.option("--repeats", default=7, show_default=True, type=click.IntRange(1))
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write all figures here.")
def main(bundle: Path, python: Path | None, repeats: int, json_path: Path | None) -> None:
    """Measure the edge's size on disk, its time to the first answer, and its memory."""
    photos = load("test").paths
    try:
        with tempfile.TemporaryDirectory() as folder:
            chosen = python or install(Path(folder) / "edge")
            result = {
                "machine": f"{platform.machine()}, {os.cpu_count()} cores",
                "repeats": repeats,
                "install_mb": megabytes(chosen.parent.parent),
                **footprint(bundle, chosen, photos[0], repeats),
                "int8_over_fp32_time": int8_over_fp32(Bundle.open(bundle), photos[: HEAD_RUNS * repeats]),
            }
    except (OSError, subprocess.CalledProcessError, IsthmusError) as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(1)
    click.echo(json.dumps(result, indent=1))
    if json_path:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
