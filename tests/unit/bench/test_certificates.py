from __future__ import annotations

import numpy as np
import pytest

from isthmus.models.recipes.vision.calibrate import Answers
from tests.bench.certificates import certificates, table


@pytest.fixture(scope="module")
def everybody() -> Answers:
    """4,000 samples of two exits that are about as often right as they say, and a cloud that is right on 95 %."""
    rng = np.random.default_rng(0)
    confidence_EN = rng.beta(8, 1, (2, 4000)).clip(0.4).astype(np.float32)
    right_EN = rng.random((2, 4000)) < confidence_EN
    exits_ENK = np.repeat(((1 - confidence_EN) / 9)[..., None], 10, axis=2)
    np.put_along_axis(exits_ENK, np.where(right_EN, 0, 1)[..., None], confidence_EN[..., None], axis=2)
    return Answers(exits_ENK, np.zeros(4000, np.int64), np.where(rng.random(4000) < 0.95, 0, 2))


@pytest.mark.parametrize("samples", [600, 3000], ids=["one threshold", "a threshold for each exit"])
def test_certificates_keep_their_promise(everybody: Answers, samples: int) -> None:
    rows = certificates(everybody, samples, calibrations=30)
    assert len(rows) == 12 and all(row["kept"] for row in rows), rows
    assert any(row["exited"] > 0.1 for row in rows), "something is promised"
    shown = table({"data": {"made up": rows}, "calibrations": 30})
    assert shown.count("| made up |") == 12
