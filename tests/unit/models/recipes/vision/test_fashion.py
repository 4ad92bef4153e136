from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
import torch

from isthmus.models.recipes.common.trainer import Run
from isthmus.models.recipes.vision import fashion, own_training
from isthmus.models.vision.bundle import Bundle

COUNTS = {"train": 160, "t10k": 40}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the Debian package holds, but few and random."""
    root, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    folder = root / fashion.PACKAGE / "usr" / "share" / "datasets" / "fashion-mnist"
    folder.mkdir(parents=True)
    for part, count in COUNTS.items():
        pixels = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(b"\0" * 16 + pixels.tobytes()))
        labels = (np.arange(count) % 10).astype(np.uint8)
        (folder / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(b"\0" * 8 + labels.tobytes()))
    return root


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fashion, "CALIBRATION", 40)


def test_parts_do_not_overlap(data: Path) -> None:
    parts = fashion.load(data)
    assert {name: len(part) for name, part in parts.items()} == {"train": 120, "calibration": 40, "test": 40}
    assert all(part.images_N3HW.shape[1:] == (3, 28, 28) for part in parts.values())
    images = [image.tobytes() for part in parts.values() for image in part.images_N3HW]
    assert len(set(images)) == sum(COUNTS.values())
    np.testing.assert_array_equal(parts["calibration"].labels_N, np.arange(120, 160) % 10)


def test_three_exits_and_a_bottleneck(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fashion, "EPOCHS", 1)
    for name in ("BOTTLENECK_EPOCHS", "DECODER_EPOCHS", "TAIL_EPOCHS"):
        monkeypatch.setattr(own_training, name, 1)
    bundle = fashion.make(tmp_path / "bundle", Run(tmp_path / "work", 0), "test", data)
    manifest = Bundle.open(bundle.folder).manifest
    assert len(manifest.heads["fp32"].exits) == 3 and manifest.tasks[0].labels == fashion.LABELS
    assert manifest.scores["test cloud accuracy"].samples == 40 and "first, second, third" in manifest.training.data


def test_the_network_is_small() -> None:
    assert sum(parameter.numel() for parameter in fashion.FashionNet().parameters()) < 2_000_000
    assert fashion.FashionNet().eval()(torch.zeros(2, 3, 28, 28)).shape == (2, 10)
