"""The benchmark of replicas in its quick mode: it runs, loses nothing, and its JSON has the promised shape."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from isthmus.models.vision.bundle import Bundle
from tests.bench.processes import ROOT


def test_two_replicas_without_a_balancer(tiny_bundle: Bundle, tmp_path: Path) -> None:
    figures = tmp_path / "replicas.json"
    quick = ("--rounds", "1", "--seconds", "1", "--photos", "40", "--devices", "2", "--in-flight", "2")
    command = [sys.executable, "-m", "tests.bench.replicas", "--balancer", "none", "--bundle", str(tiny_bundle.folder)]
    result = subprocess.run(
        [*command, *quick, "--json", str(figures)], cwd=ROOT, capture_output=True, text=True, timeout=170
    )
    assert result.returncode == 0, result.stderr[-2000:]
    found = json.loads(figures.read_text(encoding="utf-8"))
    throughput, faults = found["throughput"], found["faults"]
    assert throughput["one_median"] > 0 and throughput["two_median"] > 0 and throughput["ratio"] > 0
    assert (faults["photos"], faults["lost"], faults["doubled"], faults["wrong"]) == (40, 0, 0, 0)
