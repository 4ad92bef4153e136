from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from isthmus.models.vision.bundle import Bundle
from isthmus.models.vision.head import Head
from isthmus.models.vision.tail import Tail
from tests.unit.bench.fakes import FakeBaselines


@pytest.fixture(scope="session")
def head(tiny_bundle: Bundle) -> Head:
    return Head(tiny_bundle, threads=1)


@pytest.fixture(scope="session")
def tail(tiny_bundle: Bundle) -> Tail:
    return Tail(tiny_bundle)


@pytest.fixture(scope="session")
def images() -> list[Image.Image]:
    """Four RGB photos, 64x64, no two alike."""
    noise = np.random.default_rng(7).integers(0, 255, (4, 8, 8, 3)).astype(np.uint8)
    return [Image.fromarray(pixels_HW3).resize((64, 64), Image.Resampling.BICUBIC) for pixels_HW3 in noise]


@pytest.fixture
def baselines(monkeypatch: pytest.MonkeyPatch) -> FakeBaselines:
    """No training has been done, unless the test adds to `ready`."""
    fake = FakeBaselines()
    monkeypatch.setattr("isthmus.models.recipes.vision.baselines.trained", fake.trained)
    return fake
