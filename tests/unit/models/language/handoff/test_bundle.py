"""Opening a handoff bundle: what fits its model, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from isthmus.models.bundle.files import Files, read_manifest
from isthmus.models.errors import BundleError
from isthmus.models.language.checkpoint.checkpoint import Checkpoint
from isthmus.models.language.handoff.bundle import HandoffBundle
from isthmus.models.language.handoff.manifest import HandoffManifest
from tests.bench.tiny_llama import write_tiny_llama
from tests.tiny_handoff import write_tiny_handoff


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(write_tiny_llama(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, checkpoint: Checkpoint) -> Path:
    return write_tiny_handoff(tmp_path_factory.mktemp("handoffs") / "tiny", checkpoint)


def test_a_damaged_file_is_refused(folder: Path, checkpoint: Checkpoint, tmp_path: Path) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "fill.safetensors").write_bytes(b"0" * 100)
    with pytest.raises(BundleError, match=r"fill\.safetensors"):
        HandoffBundle.open(tmp_path, checkpoint)


def test_a_bundle_of_another_model_is_refused(folder: Path, tmp_path: Path) -> None:
    other = Checkpoint.open(write_tiny_llama(tmp_path / "other", seed=1))
    with pytest.raises(BundleError, match="belongs to the model"):
        HandoffBundle.open(folder, other)


def test_a_kv_fill_has_maps_for_each_upper_layer(folder: Path, checkpoint: Checkpoint) -> None:
    handoff, config = HandoffBundle.open(folder, checkpoint), checkpoint.config
    weight_LOH, bias_LO = handoff.kv_fill()
    assert weight_LOH.shape == (config.layers - handoff.depth, 2 * config.kv_heads * config.head_dim, config.hidden)
    assert bias_LO.shape == weight_LOH.shape[:2]


def test_parts_that_do_not_fit_the_model_are_refused(folder: Path, checkpoint: Checkpoint) -> None:
    manifest = read_manifest(folder, HandoffManifest)
    files = Files(folder, manifest.files)
    with pytest.raises(BundleError, match="do not fit a model of 1 layers"):
        HandoffBundle(files, manifest, replace(checkpoint.config, layers=1))
    with pytest.raises(BundleError, match="64 hidden values do not fit"):
        HandoffBundle(files, manifest, replace(checkpoint.config, hidden=128))
    with pytest.raises(BundleError, match=r"fill\.safetensors: shape"):
        HandoffBundle(files, manifest, replace(checkpoint.config, layers=4)).kv_fill()
