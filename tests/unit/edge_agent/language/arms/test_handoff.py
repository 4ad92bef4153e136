"""Settings of the arm handoff, from a bundle's manifest and the owner's configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from isthmus.edge_agent.config import LanguageConfig
from isthmus.edge_agent.language.arms.handoff import HandoffSettings, point_of, settings_of
from isthmus.models.errors import InvalidInput
from isthmus.models.language.checkpoint.checkpoint import Checkpoint
from isthmus.models.language.handoff.bundle import HandoffBundle
from isthmus.models.language.handoff.manifest import NEVER, StatePoint
from tests.bench.tiny_llama import write_tiny_llama
from tests.tiny_handoff import write_tiny_handoff


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("models") / "tiny", scale=0.3)


@pytest.fixture(scope="module")
def bundle(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_handoff(tmp_path_factory.mktemp("handoffs") / "tiny", Checkpoint.open(folder))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, (0.9, 0, False)),
        ({"agreement": 0.4}, (0.5, 0, False)),
        ({"agreement": 0.95}, (NEVER, 0, False)),
        ({"agreement": 0.9, "state_point": 1, "fill": True}, (0.9, 1, True)),
    ],
)
def test_settings_are_the_owners(
    folder: Path, bundle: Path, settings: dict[str, Any], expected: tuple[float, int, bool]
) -> None:
    manifest = HandoffBundle.open(bundle, Checkpoint.open(folder)).manifest
    likely, point, fill = expected
    settings_found = HandoffSettings(likely, manifest.points[point], fill)
    assert settings_of(manifest, LanguageConfig(str(folder), **{"agreement": 0.9, **settings})) == settings_found
    with pytest.raises(InvalidInput, match="point 2 does not exist, there are 0 to 1"):
        settings_of(manifest, LanguageConfig(str(folder), state_point=2))


def test_the_cheapest_point_that_loses_little_is_taken(folder: Path, bundle: Path) -> None:
    manifest = HandoffBundle.open(bundle, Checkpoint.open(folder)).manifest
    agreements = (0.9, 0.966, 0.97)
    points = tuple(
        StatePoint(context_rate=0, rate=1, mean_bytes=index, agreement=each) for index, each in enumerate(agreements)
    )
    assert point_of(manifest.model_copy(update={"points": points}), None) == points[1]
