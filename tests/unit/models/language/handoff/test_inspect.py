from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from isthmus.models.bundle.files import Files, read_manifest, write_bundle
from isthmus.models.errors import BundleError
from isthmus.models.language.checkpoint.checkpoint import Checkpoint
from isthmus.models.language.handoff.inspect import summary, verify
from isthmus.models.language.handoff.manifest import HandoffManifest
from tests.bench.tiny_llama import write_tiny_llama
from tests.tiny_handoff import write_tiny_handoff


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    checkpoint = Checkpoint.open(write_tiny_llama(tmp_path / "model", layers=3))
    return write_tiny_handoff(tmp_path / "handoff", checkpoint)


def test_the_summary_names_exits_rates_and_points(folder: Path) -> None:
    manifest = verify(folder)
    shown = "\n".join(summary(manifest))
    assert manifest.name in shown and manifest.fingerprint in shown and manifest.base[:12] in shown
    for index in range(len(manifest.rates)):
        assert f"rate {index}: " in shown
    for index in range(len(manifest.points)):
        assert f"point {index}: " in shown


def rewritten(folder: Path, name: str, data: bytes) -> Path:
    """The bundle with other data in a file, which its manifest vouches for."""
    manifest = read_manifest(folder, HandoffManifest)
    files = Files(folder, manifest.files)
    content: dict[str, Any] = manifest.model_dump(mode="json", exclude={"files", "fingerprint", "schema_version"})
    return write_bundle(
        folder, content, {**{each: files.read(each) for each in manifest.files}, name: data}, HandoffManifest
    )


def test_verify_looks_into_the_tables_of_the_states(folder: Path) -> None:
    manifest = verify(folder)
    tensors = Files(folder, manifest.files).tensors(manifest.states)
    tensors["frequencies"] = tensors["frequencies"] + np.uint16(1)
    with pytest.raises(BundleError, match="add up to"):
        verify(rewritten(folder, manifest.states, safetensors.numpy.save(tensors)))


def test_a_changed_file_is_refused(folder: Path) -> None:
    path = folder / verify(folder).states
    path.write_bytes(b"?" + path.read_bytes()[1:])
    with pytest.raises(BundleError, match="SHA-256"):
        verify(folder)
