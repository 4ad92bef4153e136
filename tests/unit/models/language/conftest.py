"""The library that checkpoints and decoders are compared with."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.fixture(scope="session")
def transformers() -> Any:
    pytest.importorskip(
        "isthmus.models.recipes.vision.compressai_entropy"
    )  # declares what torchvision lacks beside CPU PyTorch
    return pytest.importorskip("transformers")
