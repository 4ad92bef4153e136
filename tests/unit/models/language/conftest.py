"""The library that checkpoints and decoders are compared with."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.fixture(scope="session")
def transformers() -> Any:
    return pytest.importorskip("transformers")
