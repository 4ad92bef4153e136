"""Which router bundle a device uses: of its model, and of what the cloud declares."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from isthmus.edge_agent.config import LanguageConfig
from isthmus.edge_agent.language.router_bundles import installed, open_bundles
from isthmus.models.bundle.installed import NAME
from isthmus.models.errors import BundleError
from isthmus.models.language.checkpoint.checkpoint import Checkpoint
from tests.bench.tiny_llama import write_tiny_llama
from tests.tiny_router import write_tiny_router
from tests.unit.edge_agent.language.scripted_cloud import declared


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(write_tiny_llama(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of installed bundles."""
    monkeypatch.setenv(NAME, str(tmp_path))
    return tmp_path


def config(**settings: Any) -> LanguageConfig:
    return LanguageConfig(model="tiny", **settings)


def never() -> bytes:
    raise AssertionError("weights are read for nothing")


def weights(checkpoint: Checkpoint) -> Callable[[], bytes]:
    return lambda: checkpoint.fingerprint


def test_the_installed_bundle_of_both_models_is_used(place: Path, checkpoint: Checkpoint) -> None:
    other = {"name": "big", "tokenizer": bytes(32).hex(), "weights": None}
    write_tiny_router(place / "a", checkpoint)
    write_tiny_router(place / "b", checkpoint, name="b", cloud=other)
    write_tiny_router(place / "c", checkpoint, name="c", device={**device(checkpoint), "bits": 4})
    found = open_bundles(config(), checkpoint.name, weights(checkpoint))
    assert [each.manifest.name for each in found.bundles] == ["tiny-router", "b"]
    bundle = found.for_cloud(declared())
    assert bundle is not None and bundle.manifest.name == "b"
    assert found.for_cloud(None) is None and found.for_cloud(declared("another")) is None
    assert found.missing(declared("another\n")) == (
        "no router bundle is for another? 7468656d6f64 in the cloud: tiny-router is for tiny, b is for big"
    )


def device(checkpoint: Checkpoint) -> dict[str, object]:
    return {"name": checkpoint.name, "weights": checkpoint.fingerprint.hex(), "bits": 8}


def test_weights_are_read_only_for_a_bundle_of_the_same_name_and_bits(place: Path, checkpoint: Checkpoint) -> None:
    write_tiny_router(place / "a", checkpoint)
    assert open_bundles(config(), "other", never).bundles == ()
    found = open_bundles(config(device_bits=4), checkpoint.name, never)
    assert found.bundles == () and "in 8 bits, the device's model has 4" in found.missing(declared())


def test_without_bundles_it_says_so(place: Path) -> None:
    found = open_bundles(config(), "tiny", never)
    assert found.missing(declared()) == "no router bundle is installed for the device's model"


def test_a_cache_of_8_bits_has_no_certified_levels(place: Path, checkpoint: Checkpoint) -> None:
    write_tiny_router(place / "a", checkpoint)
    found = open_bundles(config(kv_bits=8), checkpoint.name, never)
    assert found.bundles == ()
    assert found.missing(declared()) == "router bundles are certified for KV caches of 32 bits, and not used with 8"


@pytest.mark.parametrize(
    ("bits", "fingerprint", "words"),
    [
        (4, b"", "in 8 bits, the device's model has 4: it is not used"),
        (8, bytes(32), "the device holds 000000000000: it is not used"),
    ],
)
def test_a_configured_bundle_of_another_model_is_named_and_not_used(
    tmp_path: Path, checkpoint: Checkpoint, bits: int, fingerprint: bytes, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_tiny_router(tmp_path / "a", checkpoint)
    with caplog.at_level(logging.WARNING):
        found = open_bundles(config(router=folder, device_bits=bits), checkpoint.name, lambda: fingerprint)
    assert found.bundles == () and found.missing(declared()).endswith(words)
    assert [record.message for record in caplog.records] == [found.problem]


def test_a_configured_bundle_that_is_broken_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no such bundle folder"):
        open_bundles(config(router=tmp_path / "missing"), "tiny", never)


def test_an_installed_bundle_that_is_broken_is_passed_over(
    tmp_path: Path, checkpoint: Checkpoint, caplog: pytest.LogCaptureFixture
) -> None:
    (write_tiny_router(tmp_path / "a", checkpoint) / "head.safetensors").write_bytes(b"")
    (tmp_path / "b").mkdir()
    (tmp_path / "c").write_text("no folder")
    write_tiny_router(tmp_path / "d", checkpoint, name="d")
    with caplog.at_level(logging.WARNING):
        assert [each.manifest.name for each in installed([tmp_path, tmp_path / "missing"])] == ["d"]
    assert len(caplog.records) == 2 and "passed over" in caplog.text
