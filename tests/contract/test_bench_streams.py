"""The benchmark of streams in its quick mode: it runs, and its JSON has the promised shape."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from isthmus.models.vision.bundle import Bundle
from tests.bench.processes import ROOT


def test_streams_quick(tiny_bundle: Bundle, tmp_path: Path) -> None:
    figures = tmp_path / "streams.json"
    command = ["tests.bench.streams", "--quick", "--bundle", str(tiny_bundle.folder), "--json", str(figures)]
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, timeout=170)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(figures.read_text(encoding="utf-8"))
    assert result["frames"] == {"drawn": 32}
    shares = [row["saved"] for row in result["gate"]]
    assert shares[0] <= shares[-1] and 0.5 < shares[-1] < 1
    assert result["certified"][0]["certificate"] is None  # two blocks certify next to nothing
    assert result["certified"][-1]["certificate"]["blocks"] == 2
    assert result["speed"]["frames"] == 10 and result["speed"]["degraded"] == 0
    assert result["memory"]["frames"] >= 60
