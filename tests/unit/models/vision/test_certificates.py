from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from isthmus.models.vision.bundle import Bundle
from isthmus.models.vision.certificates import dependencies, runtime, void_because
from isthmus.models.vision.manifest import Manifest
from tests.conftest import Parts


@pytest.fixture
def certified(paper: Parts, tmp_path: Path) -> Manifest:
    """A manifest whose certificates were made here and now."""
    found = dependencies(Bundle.open(paper.write(tmp_path / "draft")).manifest, "fp32")
    paper.manifest["heads"]["fp32"]["depends_on"] = found.model_dump()
    return Bundle.open(paper.write(tmp_path / "b")).manifest


def changed(manifest: Manifest, **fields: Any) -> Manifest:
    head = manifest.heads["fp32"]
    head = head.model_copy(update={"depends_on": head.depends_on.model_copy(update=fields)})
    return manifest.model_copy(update={"heads": {"fp32": head}})


def test_certificates_hold_where_they_were_made(certified: Manifest) -> None:
    assert void_because(certified, "fp32") is None


def test_another_runtime_voids_them(certified: Manifest) -> None:
    words = f"certified with onnxruntime 0.9, this is {runtime()}"
    assert void_because(changed(certified, runtime="onnxruntime 0.9"), "fp32") == words


@pytest.mark.parametrize("what", ["graphs", "cloud", "preprocessing"])
def test_another_part_voids_them(certified: Manifest, what: str) -> None:
    assert void_because(changed(certified, **{what: "f" * 64}), "fp32") == f"certified with other {what}"


def test_another_preprocessing_voids_them(certified: Manifest) -> None:
    spec = certified.preprocessing.model_copy(update={"mean": (0.4, 0.5, 0.5)})
    assert (
        void_because(certified.model_copy(update={"preprocessing": spec}), "fp32")
        == "certified with other preprocessing"
    )
