"""Manifests made to hurt: each must end in a BundleError, soon and in one line, whatever it holds."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.models.bundle.files import MAX_MANIFEST_BYTES
from isthmus.models.errors import BundleError
from isthmus.models.language.router.bundle import RouterBundle
from isthmus.models.vision.bundle import Bundle
from tests.conftest import Parts

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)

HOSTILE = {
    "empty": b"",
    "not JSON": b"PK\x03\x04",
    "not UTF-8": b"\x80\x81\x82",
    "two objects": b"{}{}",
    "a list": b"[]",
    "a number": b"1",
    "deeply nested": b"[" * 1_000_000,
    "deeply nested object": b'{"schema_version":4,"a":' * 200_000,
    "number of a million digits": b'{"schema_version":' + b"9" * 1_000_000 + b"}",
    "larger than the limit": b" " * (MAX_MANIFEST_BYTES + 1),
    "a field that no terminal can print": b'{"schema_version":4,"\\ud800":1}',
    "a field with line breaks": b'{"schema_version":4,"\\n\\u001b[2J":1}',
    "version of a megabyte": b'{"schema_version":"' + b"1" * 1_000_000 + b'"}',
    "field name of a megabyte": b'{"schema_version":4,"' + b"a" * 1_000_000 + b'":1}',
}


OPENERS: tuple[tuple[int, Callable[[Path], object]], ...] = ((4, Bundle.open), (3, RouterBundle.open))


@pytest.mark.parametrize(("version", "open_bundle"), OPENERS, ids=["vision", "router"])
@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_manifests_end_in_one_line(
    tmp_path: Path, data: bytes, version: int, open_bundle: Callable[[Path], object]
) -> None:
    (tmp_path / "manifest.json").write_bytes(data.replace(b'"schema_version":4', b'"schema_version":%d' % version))
    with pytest.raises(BundleError) as caught:
        open_bundle(tmp_path)
    message = str(caught.value)
    assert "manifest.json" in message
    assert "\n" not in message
    assert len(message) < 1000
    assert message.encode()  # a lone surrogate would fail here, and in a log


@given(content=st.dictionaries(st.text(), JSON))
def test_any_json_object_is_refused_as_a_bundle_error(
    tmp_path_factory: pytest.TempPathFactory, content: dict[str, object]
) -> None:
    folder = tmp_path_factory.mktemp("any")
    for version, open_bundle in OPENERS:
        (folder / "manifest.json").write_text(json.dumps({**content, "schema_version": version}), encoding="utf-8")
        with pytest.raises(BundleError):
            open_bundle(folder)


def test_no_damaged_manifest_is_taken_for_another_one(paper: Parts, tmp_path: Path) -> None:
    path = paper.write(tmp_path / "b") / "manifest.json"
    good, manifest = path.read_bytes(), Bundle.open(tmp_path / "b").manifest
    rng = random.Random(0)
    refused = 0
    for _ in range(300):
        data = bytearray(good)
        data[rng.randrange(len(data))] = rng.randrange(256)
        path.write_bytes(data)
        try:
            assert Bundle.open(tmp_path / "b").manifest == manifest
        except BundleError:
            refused += 1
    assert refused > 200  # white space may change, hardly anything else
