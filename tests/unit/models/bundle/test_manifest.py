from __future__ import annotations

from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from isthmus.models.bundle.manifest import BundleManifest, FileEntry, FileName, Interval, Name

HASH = "0" * 64
CONTENT: dict[str, Any] = {
    "schema_version": 3,
    "name": "any",
    "licence": "none",
    "training": {"command": "none", "seed": 0, "seconds": 0, "machine": "m", "data": "d", "versions": {"numpy": "1"}},
    "scores": {"test": {"value": 0.5, "low": 0.4, "high": 0.6, "samples": 10}},
    "files": {"a.onnx": {"size": 1, "sha256": HASH}},
    "fingerprint": HASH,
}


def test_a_manifest_comes_back_as_it_was_written() -> None:
    manifest = BundleManifest.model_validate(CONTENT)
    assert manifest.model_dump(mode="json") == CONTENT


@pytest.mark.parametrize("name", ["/etc/passwd", "..", "../a", "a/b", ".a", "", "a\n", "a\\b", "a" * 101])
def test_no_file_name_leads_out_of_the_folder(name: str) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(FileName).validate_python(name)


@pytest.mark.parametrize("name", ["Upper", "-dash", "", "a b", "a" * 65])
def test_names_are_plain(name: str) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(Name).validate_python(name)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"schema_version": 2}, "schema_version"),
        ({"surprise": 1}, "surprise"),
        ({"fingerprint": "0"}, "fingerprint"),
        ({"training": {**CONTENT["training"], "seconds": -1}}, "training.seconds"),
        ({"training": {**CONTENT["training"], "seconds": float("nan")}}, "training.seconds"),
    ],
)
def test_a_field_out_of_range_is_named(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        BundleManifest.model_validate({**CONTENT, **change})


def test_parts_are_frozen() -> None:
    entry = FileEntry(size=1, sha256=HASH)
    with pytest.raises(ValidationError, match="frozen"):
        entry.size = 2


def test_an_interval_is_of_fractions() -> None:
    with pytest.raises(ValidationError, match="high"):
        Interval(value=0.5, low=0.1, high=1.1, samples=1)
