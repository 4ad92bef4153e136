"""These tests need programs that are not installed by pip; they run only when asked for by path (`make acceptance`)."""

from __future__ import annotations

from pathlib import Path

import pytest


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave them out of a run of all tests."""
    asked = any("acceptance" in argument for argument in config.invocation_params.args)
    return None if asked else True
