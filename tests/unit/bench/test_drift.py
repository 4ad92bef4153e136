"""The benchmark of the drift gate on made-up statistics."""

from __future__ import annotations

import numpy as np
import pytest

from tests.bench import drift
from tests.bench.audit_recording import AS_IS


def test_figures_of_made_up_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drift, "BEFORE", (100, 200))
    random = np.random.default_rng(0)
    rows = {AS_IS: random.normal(size=(400, 3)), "noise 5": random.normal(2, 1, size=(400, 3))}
    row = drift.measure({kind: each.astype(np.float32) for kind, each in rows.items()}, streams=10, unshifted=250)
    assert row["false_alarms"]["value"] == 0
    assert [each["alarmed"]["value"] for each in row["shifts"].values()] == [1, 1]
    assert "| noise 5, after 200 | 100.0%" in drift.table(row)
