"""Opening a router bundle, which cloud's model it fits, and what is printed of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from click.testing import CliRunner

from isthmus.models.bundle.cli import main
from isthmus.models.bundle.files import write_bundle
from isthmus.models.errors import BundleError
from isthmus.models.language.checkpoint.checkpoint import Checkpoint
from isthmus.models.language.handoff.confidence_head import FEATURES
from isthmus.models.language.router.bundle import RouterBundle
from isthmus.models.language.router.manifest import RouterManifest
from isthmus.models.messages import ModelInfo, TokenizerInfo
from tests.bench.tiny_llama import write_tiny_llama
from tests.tiny_router import LEVELS, write_tiny_router
from tests.unit.models.language.router.test_manifest import content


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(write_tiny_llama(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, checkpoint: Checkpoint) -> Path:
    return write_tiny_router(tmp_path_factory.mktemp("routers") / "tiny", checkpoint)


def test_head_and_levels(folder: Path) -> None:
    bundle = RouterBundle.open(folder)
    sure_V, unsure_V = np.zeros((2, 259), np.float32)
    sure_V[7] = 50
    assert bundle.head is not None and bundle.head(sure_V, [7]) > 0.5 > bundle.head(unsure_V, [7])
    assert [level.model_dump() for level in bundle.levels] == LEVELS


def declared(**changes: object) -> ModelInfo:
    tokenizer = TokenizerInfo(bytes.fromhex("cd" * 32), 1, b"v" * 32)
    made = ModelInfo(bytes.fromhex("ee" * 32), "Large/Model", 9, 99, "engine", tokenizer, (0,), ("cloud",))
    return replace(made, **changes)  # type: ignore[arg-type]


OTHER_TOKENIZER = TokenizerInfo(bytes(32), 1, b"v" * 32)


@pytest.mark.parametrize(
    ("weights", "changes", "fits"),
    [
        (None, {}, True),
        (None, {"fingerprint": bytes(32)}, True),
        (None, {"name": "another"}, False),
        (None, {"tokenizer": OTHER_TOKENIZER}, False),
        ("ee" * 32, {}, True),
        ("ee" * 32, {"name": "another", "tokenizer": OTHER_TOKENIZER}, True),
        ("ee" * 32, {"fingerprint": bytes(32)}, False),
    ],
)
def test_a_bundle_fits_by_weights_or_else_by_name_and_tokenizer(
    folder: Path, tmp_path: Path, checkpoint: Checkpoint, weights: str | None, changes: dict[str, object], fits: bool
) -> None:
    cloud = {**content()["cloud"], "weights": weights}
    bundle = RouterBundle.open(write_tiny_router(tmp_path / "b", checkpoint, cloud=cloud))
    assert bundle.fits(declared(**changes)) == fits


@pytest.mark.parametrize("damage", [b"", b"0" * 900], ids=["empty", "other"])
def test_a_damaged_file_is_refused(folder: Path, tmp_path: Path, damage: bytes) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "head.safetensors").write_bytes(damage)
    with pytest.raises(BundleError, match=r"head\.safetensors"):
        RouterBundle.open(tmp_path)


def test_a_head_of_another_shape_is_refused(tmp_path: Path) -> None:
    kept = {name: value for name, value in content().items() if name not in ("schema_version", "files", "fingerprint")}
    tensors = {
        "judge.0.weight": np.zeros((2, FEATURES + 1), np.float32),
        "judge.0.bias": np.zeros(2, np.float32),
        "judge.2.weight": np.zeros((1, 2), np.float32),
        "judge.2.bias": np.zeros(1, np.float32),
    }
    files = {"head.safetensors": safetensors.numpy.save(tensors)}
    folder = write_bundle(tmp_path / "b", kept, files, RouterManifest)
    with pytest.raises(BundleError, match="inconsistent"):
        RouterBundle.open(folder)


def test_inspect_prints_pair_and_levels(folder: Path) -> None:
    done = CliRunner().invoke(main, ["inspect", str(folder)])
    assert done.exit_code == 0 and "in 8 bits on the device" in done.stdout
    assert "tokens from 0.500: 20.0% asked, 10.00% [10.00%, 10.00%] wrong, certified 10.00%" in done.stdout


def test_the_bytes_of_a_bundle_are_golden(tmp_path: Path, golden: Callable[[str, bytes], None]) -> None:
    kept = {name: value for name, value in content().items() if name not in ("schema_version", "files", "fingerprint")}
    tensors = {
        "judge.0.weight": np.arange(2 * FEATURES, dtype=np.float32).reshape(2, FEATURES) / 8,
        "judge.0.bias": np.array([0.5, -0.5], np.float32),
        "judge.2.weight": np.array([[1.0, -1.0]], np.float32),
        "judge.2.bias": np.array([0.25], np.float32),
    }
    files = {"head.safetensors": safetensors.numpy.save(tensors)}
    folder = write_bundle(tmp_path / "b", kept, files, RouterManifest)
    golden("router_manifest_v3.json", (folder / "manifest.json").read_bytes())
    golden("router_head_v3.safetensors", (folder / "head.safetensors").read_bytes())
    assert RouterBundle.open(folder).manifest.cloud.name == "Large/Model"
