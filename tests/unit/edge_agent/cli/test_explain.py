from __future__ import annotations

import json
from pathlib import Path

from click.testing import CliRunner
from PIL import Image

from isthmus.edge_agent.cli.explain import table
from isthmus.edge_agent.cli.main import main
from isthmus.edge_agent.policy.exits import Candidate
from isthmus.edge_agent.vision.result import Answer
from isthmus.models.vision.bundle import Bundle

ANSWER = Answer(
    "good", 0, (0.9, 0.1), {}, (), "split", None, "deep", 1.0, 1, 330, 25, {"total": 41.26}, False, 1.5e-6, "x", 0.212,
    (
        Candidate("answer at exit1", False, "exit1 confidence 0.600 < 0.900", 0, 0, 0, 0, 0, 0, None, 0.6),
        Candidate("deep rate 1 (330 B)", True, None, 0.0401, 0.0099, 355, 1.5e-6, 0.2, 1, 0.97, 0.874),
    ),
)  # fmt: skip


def test_the_table_is_aligned_and_marks_the_choice() -> None:
    header, exit_, deep, took = table(ANSWER)
    assert header.split() == ["way", "ms", "bytes", "µ$", "mJ", "modelled", "calls", "agreement", "right"]
    assert exit_.split()[:3] == ["answer", "at", "exit1"] and exit_.endswith("60.0%  exit1 confidence 0.600 < 0.900")
    assert " ".join(deep.split()) == "> deep rate 1 (330 B) 40.1 ± 9.9 355 1.50 200.0 1 97.0% 87.4%"
    assert exit_.index("60.0%") == deep.index("87.4%")
    assert took == "    took 41.3 ms, 330 B up, 25 B down, 1.50 µ$, 212.0 mJ by the model"


def test_files_are_explained_for_people_and_machines(tiny_bundle: Bundle, photo: Image.Image, tmp_path: Path) -> None:
    photo.save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no photo")
    arguments = ("explain", str(tmp_path / "a.png"), str(tmp_path / "b.png"), "--bundle", str(tiny_bundle.folder))
    result = CliRunner().invoke(main, [*arguments, "--private"])
    assert result.exit_code == 1 and "not a readable" in result.stderr
    assert "why: " in result.stdout and "> answer at exit1" in result.stdout.replace("  ", " ").replace("  ", " ")
    row = json.loads(CliRunner().invoke(main, [*arguments[:2], *arguments[3:], "--json"]).stdout)
    assert row["candidates"][0]["name"] == "answer at exit1" and row["candidates"][0]["chosen"]
