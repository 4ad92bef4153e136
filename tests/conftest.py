"""Fixtures that several rooms' tests share. Golden files are written anew by `pytest --regenerate-golden`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import settings
from numpy.typing import NDArray
from PIL import Image

from isthmus.models.bundle.files import MANIFEST, fingerprint_of, write_bundle
from isthmus.models.codecs import checkerboard as contextual
from isthmus.models.codecs.context_model import ALL_CONTEXTS, ENDS
from isthmus.models.codecs.tables import SHAPES
from isthmus.models.vision.architecture import TapArchitecture
from isthmus.models.vision.bundle import Bundle
from isthmus.models.vision.manifest import Manifest
from isthmus.models.vision.split import SplitClassifier
from tests.tiny_bundle import SIDE, TINY, certificate, depends_on, random_split, write_tiny_bundle

settings.register_profile("isthmus", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("isthmus")

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests and the processes that they start leave the user's cache and state alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        yield


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


@pytest.fixture(scope="session")
def tiny_split() -> SplitClassifier:
    """The network of `tiny_bundle`, in eval mode. Read only."""
    return random_split()


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory, tiny_split: SplitClassifier) -> Bundle:
    """A real bundle, small and untrained: see `tests.tiny_bundle`. Read only."""
    return write_tiny_bundle(tmp_path_factory.mktemp("zoo") / "tiny", tiny_split)


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
    """What `models.bundle.files.write_bundle` takes; `write` and `tamper` put it on disk, whole or broken."""

    manifest: dict[str, Any]
    files: dict[str, bytes]

    def write(self, folder: Path) -> Path:
        return write_bundle(folder, self.manifest, self.files, Manifest)

    def tamper(self, folder: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
        """Write, then change the manifest's content; its fingerprint is made true again."""
        path = self.write(folder) / MANIFEST
        content = json.loads(path.read_bytes())
        change(content)
        content["fingerprint"] = fingerprint_of(content)
        path.write_text(json.dumps(content), encoding="utf-8")
        return folder

    def replace(self, folder: Path, name: str, data: bytes) -> Path:
        """Write, then put `data` under `name` with a manifest that vouches for it."""
        entry = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        self.tamper(folder, lambda content: content["files"].update({name: entry}))
        (folder / name).write_bytes(data)
        return folder


ROWLESS = {
    "near_L2": (2,),
    "slope_L": (),
    "bias_L2": (2,),
    "ends_L24": (2, ENDS),
    "prior_LK": (ALL_CONTEXTS,),
}


def paper_tables() -> dict[str, NDArray[Any]]:
    """One rate of two channels that are always zero, and one table that nobody uses."""
    none = {field: np.zeros((0, *shape), SHAPES[field][0]) for field, shape in ROWLESS.items()}
    tables = contextual.Tables(
        gain_RC=np.array([[1.0, 2.0]], np.float32),
        low_RC=np.zeros((1, 2), np.int8),
        high_RC=np.zeros((1, 2), np.int8),
        table_E=np.zeros(1, np.uint8),
        first_E=np.zeros(1, np.int16),
        lengths_T=np.array([3], np.uint16),
        frequencies=np.array([40_000, 20_000, 5_536], np.uint16),
        **none,
    )
    return contextual.to_tensors(tables)


PAPER_TAP = TapArchitecture(after=1, latent_channels=2, decoder_channels=16, rates=1)


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
        "tasks": [{"name": "defect", "labels": ["good", "bäd"]}],
        "licence": "Apache-2.0",
        "preprocessing": {"resize": 8, "crop": [8, 8], "mean": [0.5, 0.5, 0.5], "deviation": [0.5, 0.5, 0.5]},
        "architecture": TINY.model_copy(
            update={"classes": (2,), "cuts": (2,), "taps": (PAPER_TAP,)},
        ).model_dump(mode="json", exclude_none=True),
        "weights": "weights.safetensors",
        "segments": [{"input": [3, 8, 8], "output": [16, 4, 4], "macs": 1000}],
        "heads": {
            "fp32": {
                "files": ["head0.onnx"],
                "exits": [{"name": "exit0", **figures}],
                "thresholds": [certificate(0.01, (0.9,))],
                "depends_on": depends_on("fp32"),
            }
        },
        "taps": [
            {
                "name": "deep",
                "encoder": "encoder.onnx",
                "tables": "tables.safetensors",
                "latent": [2, 4, 4],
                "tail_macs": 3000,
                "max_payload_bytes": 64,
                "widths": [
                    {
                        "width": 1.0,
                        "encoder_macs": 100,
                        "rates": [{"mean_bytes": 9.5, "max_bytes": 12, **figures}],
                    }
                ],
            }
        ],
        "images": [{"form": "jpeg", "quality": 75, "mean_bytes": 90.0, **figures}],
        "calibration_samples": 300,
        "tail_macs": 2000,
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
