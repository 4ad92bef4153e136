"""These tests need programs that are not in .venv; they run only when asked for by path (`make acceptance`)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
ENGINE_S = 900.0  # for tests of engines, one of which may have to be installed


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave them out of a run of all tests."""
    asked = (config.invocation_params.dir / argument.partition("::")[0] for argument in config.invocation_params.args)
    return None if any(path.resolve().is_relative_to(HERE) for path in asked) else True


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give tests of engines time to start one."""
    for item in items:
        if "smollm2" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.timeout(ENGINE_S))


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2 as a Hugging Face folder, float32."""
    folder = ROOT / "build" / "smollm2"
    if not folder.exists():
        command = ("isthmus.models.language.checkpoint", "export", "smollm2", str(folder))
        subprocess.run([sys.executable, "-m", *command], check=True, timeout=ENGINE_S)
    return folder


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokenizers that devices fetch are not there before."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
