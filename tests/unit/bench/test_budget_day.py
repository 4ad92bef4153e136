from __future__ import annotations

import json
from pathlib import Path

from click.testing import CliRunner

from tests.bench.budget_day import main


def test_a_day_with_a_budget_stays_below_it_at_every_hour(tmp_path: Path) -> None:
    arguments = ["--hours", "3", "--period", "60", "--kilobytes", "100", "--json", str(tmp_path / "day.json")]
    found = CliRunner().invoke(main, [*arguments, "--plot", str(tmp_path / "day.png")])
    assert found.exit_code == 0, found.output
    free, limited = json.loads((tmp_path / "day.json").read_text())["days"].values()
    assert free["bytes"][-1] > limited["bytes"][-1] > 0
    assert all(spent <= 100_000 * (0.1 + 0.9 * hour / 24) for hour, spent in enumerate(limited["bytes"], start=1))
    assert (tmp_path / "day.png").read_bytes().startswith(b"\x89PNG")
