"""Fixtures that several rooms' tests share. Golden files are written anew by `pytest --regenerate-golden`."""

from __future__ import annotations

import copy
import hashlib
import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
from hypothesis import settings
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from models import bundle as bundles
from models.bundle import Bundle
from models.codecs import factorized
from models.codecs.factorized import RateTables
from models.manifest import Architecture, Preprocessing
from models.recipes import export
from models.vision.split import SplitClassifier

settings.register_profile("isthmus", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("isthmus")

ROOT = Path(__file__).parent.parent
SIDE = 64
TINY = Architecture(
    builder="split_classifier",
    backbone="efficientnet_lite0",
    classes=2,
    cuts=(2, 5),
    latent_channels=4,
    decoder_channels=16,
    rates=2,
)
PREPROCESSING = Preprocessing(resize=SIDE, crop=(SIDE, SIDE), mean=(0.5, 0.5, 0.5), deviation=(0.5, 0.5, 0.5))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--regenerate-golden", action="store_true", help="write tests/golden anew from what the code does")


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, bytes], None]:
    """`golden(name, data)` fails unless `data` are the committed bytes of tests/golden/<name>."""

    def check(name: str, data: bytes) -> None:
        path = ROOT / "tests" / "golden" / name
        if request.config.getoption("--regenerate-golden"):
            path.write_bytes(data)
        assert data == path.read_bytes(), f"{name}: the format changed; old files and peers cannot be read any more"

    return check


def laplace_tables(widths: tuple[float, ...], gain: float) -> RateTables:
    """Tables of one rate: a rounded Laplace distribution of each width over -20 .. 20, then the escape."""
    frequencies = []
    for width in widths:
        mass = np.exp(-np.abs(np.arange(-20, 21)) / width)
        counts = np.maximum(np.floor(mass / mass.sum() * 65_000), 1).astype(np.int64)
        counts[20] += (1 << 16) - 1 - counts.sum()
        frequencies.append(np.append(counts, 1))
    count = len(widths)
    return RateTables(np.full(count, gain, np.float32), np.full(count, -20, np.int32), tuple(frequencies))


@pytest.fixture(scope="session")
def tiny_split() -> SplitClassifier:
    """EfficientNet-Lite0 with seeded random weights and batch-norm statistics of random images, in eval mode."""
    torch.manual_seed(0)
    split = SplitClassifier(TINY)
    norms = [module for module in split.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, std=0.2)
    nn.init.normal_(split.decoder.rate_bias.weight, std=0.3)
    with torch.no_grad():
        images_B3HW = torch.rand(8, 3, SIDE, SIDE) * 2 - 1
        early_BCHW = split.train().segment(0, images_B3HW)
        late_BCHW = split.segment(1, early_BCHW)
        split.exits[0](early_BCHW)
        split.exits[1](late_BCHW)
        split.tail(split.decoder(split.encoder(late_BCHW), torch.arange(8) % 2))
        split.tail(late_BCHW)
    return split.eval()


def random_samples(count: int, seed: int) -> export.Samples:
    """Smooth random images as the preprocessing gives them, with labels of no meaning."""
    rng = np.random.default_rng(seed)
    coarse = rng.uniform(-1, 1, (count, 3, SIDE // 8, SIDE // 8)).astype(np.float32)
    images = [image_CHW.repeat(8, axis=1).repeat(8, axis=2) for image_CHW in coarse]
    return export.Samples(images, np.arange(count) % 2)


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory, tiny_split: SplitClassifier) -> Bundle:
    """A real bundle, small and untrained: 2 labels, 64x64 photos, 2 exits, 2 rates, latent (4, 8, 8). Read only."""
    trained = export.Trained(
        split=copy.deepcopy(tiny_split),
        tables=(laplace_tables((1, 1, 1, 1), 2.0), laplace_tables((2, 2, 2, 2), 6.0)),
        architecture=TINY,
        preprocessing=PREPROCESSING,
        max_payload_bytes=4096,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's ONNX exporter warns of itself and of shapes it takes as constants
        return export.write(
            tmp_path_factory.mktemp("zoo") / "tiny",
            trained,
            about={"name": "tiny", "labels": ("good", "bad"), "licence": "none: random weights"},
            training={"command": "tests/conftest.py", "seed": 0, "seconds": 0.0, "data": "none"},
            calibration=random_samples(6, seed=1),
            test=random_samples(4, seed=2),
        )


@pytest.fixture
def elpv_bundle() -> Bundle:
    """The bundle that ships."""
    return Bundle.open(ROOT / "models" / "zoo" / "elpv")


@pytest.fixture(scope="session")
def photo() -> Image.Image:
    """A 64x64 RGB photo: gradients with noise, the same in every run."""
    down, across = np.mgrid[0:SIDE, 0:SIDE] * (200 / SIDE)
    noise = np.random.default_rng(0).integers(0, 50, (SIDE, SIDE, 3))
    smooth = np.stack([down, across, (down + across) / 2], axis=-1)
    return Image.fromarray((smooth + noise).astype(np.uint8))


@dataclass(frozen=True)
class Parts:
    """What `models.bundle.write` takes; `write` and `tamper` put it on disk, whole or broken."""

    manifest: dict[str, Any]
    files: dict[str, bytes]

    def write(self, folder: Path) -> Path:
        return bundles.write(folder, self.manifest, self.files).folder

    def tamper(self, folder: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
        """Write, then change the manifest's content; its fingerprint is made true again."""
        path = self.write(folder) / bundles.MANIFEST
        content = json.loads(path.read_bytes())
        change(content)
        content["fingerprint"] = bundles.fingerprint_of(content)
        path.write_text(json.dumps(content), encoding="utf-8")
        return folder

    def replace(self, folder: Path, name: str, data: bytes) -> Path:
        """Write, then put `data` under `name` with a manifest that vouches for it."""
        entry = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        self.tamper(folder, lambda content: content["files"].update({name: entry}))
        (folder / name).write_bytes(data)
        return folder


def paper_tables() -> dict[str, NDArray[Any]]:
    """One rate, two channels, small enough to check by hand."""
    frequencies = (np.array([1 << 15, 1 << 14, (1 << 14) - 1, 1]), np.array([60_000, 5_535, 1]))
    tables = RateTables(np.array([1.0, 2.0], np.float32), np.array([-1, 0], np.int32), frequencies)
    return factorized.to_tensors((tables,))


@pytest.fixture
def paper() -> Parts:
    """A bundle of a few hundred bytes whose networks are no networks: enough for everything that runs none."""
    files = {
        "weights.safetensors": safetensors.numpy.save({"w": np.arange(6, dtype=np.float32).reshape(2, 3)}),
        "tables.safetensors": safetensors.numpy.save(paper_tables()),
        "head0.onnx": b"not an ONNX graph",
        "encoder.onnx": b"neither is this",
    }
    figures = {"accuracy": 0.75, "agreement": 0.5}
    manifest: dict[str, Any] = {
        "name": "paper",
        "task": "classification",
        "labels": ["good", "bäd"],
        "licence": "Apache-2.0",
        "preprocessing": {"resize": 8, "crop": [8, 8], "mean": [0.5, 0.5, 0.5], "deviation": [0.5, 0.5, 0.5]},
        "architecture": {**TINY.model_dump(mode="json"), "cuts": [2], "latent_channels": 2, "rates": 1},
        "weights": "weights.safetensors",
        "segments": [{"file": "head0.onnx", "input": [3, 8, 8], "output": [16, 4, 4], "macs": 1000}],
        "exits": [{"name": "exit0", **figures}],
        "bottleneck": {
            "encoder": "encoder.onnx",
            "tables": "tables.safetensors",
            "latent": [2, 4, 4],
            "encoder_macs": 100,
            "max_payload_bytes": 64,
            "rates": [{"mean_bytes": 9.5, "max_bytes": 12, **figures}],
        },
        "tail_macs": 2000,
        "thresholds": [
            {"epsilon": 0.01, "delta": 0.1, "confidence": 0.9, "coverage": 0.5, "loss": 0.0, "samples": 300}
        ],
        "training": {
            "command": "none",
            "seed": 0,
            "seconds": 1.5,
            "machine": "paper",
            "data": "none",
            "versions": {"numpy": "1.26.4"},
        },
        "scores": {"test cloud accuracy": {"value": 0.75, "low": 0.5, "high": 0.9, "samples": 20}},
        "units": {"macs": "multiply-accumulate operations"},
    }
    return Parts(manifest, files)
