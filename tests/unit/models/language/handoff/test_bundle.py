"""A hand-off bundle as it is opened: what fits its model, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from isthmus.models.errors import BundleError
from isthmus.models.language.checkpoint.checkpoint import Checkpoint
from isthmus.models.language.handoff.bundle import HandoffBundle
from isthmus.models.language.handoff.manifest import HandoffManifest
from tests.bench.tiny_llama import write_tiny_llama
from tests.tiny_handoff import LEVELS, write_tiny_handoff


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(write_tiny_llama(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, checkpoint: Checkpoint) -> Path:
    return write_tiny_handoff(tmp_path_factory.mktemp("handoffs") / "tiny", checkpoint)


@pytest.fixture
def manifest(folder: Path) -> Any:
    return json.loads((folder / "manifest.json").read_text())


def test_the_judge_of_a_copy(folder: Path, checkpoint: Checkpoint) -> None:
    found = HandoffBundle.open(folder, checkpoint).local_model(8)
    assert found is not None
    judge, levels = found
    sure_V, unsure_V = np.zeros((2, 259), np.float32)
    sure_V[7] = 50
    assert judge(sure_V, [7]) > 0.5 > judge(unsure_V, [7])
    assert [level.model_dump() for level in levels] == LEVELS
    assert HandoffBundle.open(folder, checkpoint).local_model(4) is None


@pytest.mark.parametrize(
    ("levels", "words"),
    [
        ([], "at least 1"),
        (LEVELS[1:], "must rise from likely 0"),
        ([LEVELS[0], LEVELS[0]], "must rise from likely 0"),
        ([{**LEVELS[0], "wrong": 1.5}], "less than or equal to 1"),
        ([{"likely": 0.0}], "Field required"),
    ],
)
def test_levels_that_are_none(manifest: Any, levels: list[Any], words: str) -> None:
    manifest["copies"][0]["levels"] = levels
    with pytest.raises(ValidationError, match=words):
        HandoffManifest.model_validate(manifest)


def test_points_out_of_order(manifest: Any) -> None:
    manifest["points"] = manifest["points"][::-1]
    with pytest.raises(ValidationError, match="must rise"):
        HandoffManifest.model_validate(manifest)


def test_a_copy_whose_judge_is_not_listed(manifest: Any) -> None:
    manifest["copies"][0]["judge"] = "copy5.safetensors"
    with pytest.raises(ValidationError, match=r"files does not list copy5\.safetensors"):
        HandoffManifest.model_validate(manifest)


def test_a_copy_of_bits_that_no_device_has(manifest: Any) -> None:
    manifest["copies"][0]["bits"] = 5
    with pytest.raises(ValidationError, match="4 or 8"):
        HandoffManifest.model_validate(manifest)


def test_a_damaged_judge_is_noticed(folder: Path, checkpoint: Checkpoint, tmp_path: Path) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "copy8.safetensors").write_bytes(b"0" * 100)
    with pytest.raises(BundleError, match=r"copy8\.safetensors"):
        HandoffBundle.open(tmp_path, checkpoint)
