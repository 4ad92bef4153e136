"""Every bundle that ships: whole, small enough, true to its manifest, and bit-exact in another process."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from models.bundle import Bundle
from models.codecs.factorized import Integers
from models.recipes.elpv_data import load
from models.vision.head import Head
from models.vision.images import open_image, preprocess
from models.vision.tail import Tail, load_split
from tests.bench.processes import ROOT

ZOO = sorted(path.parent for path in (ROOT / "models" / "zoo").glob("*/manifest.json"))
MAX_ZOO_BYTES = 60_000_000


@pytest.fixture(scope="module", params=ZOO, ids=lambda folder: folder.name)
def shipped(request: pytest.FixtureRequest) -> Bundle:
    return Bundle.open(request.param)


def test_there_is_a_zoo_and_it_is_small() -> None:
    assert [folder.name for folder in ZOO] == ["elpv"]
    assert sum(path.stat().st_size for path in (ROOT / "models" / "zoo").rglob("*") if path.is_file()) <= MAX_ZOO_BYTES


def test_manifest_says_how_it_was_made_and_what_it_scored(shipped: Bundle) -> None:
    manifest = shipped.manifest
    assert manifest.training.command.startswith("python -m models.recipes") and manifest.training.seconds > 0
    assert {"test cloud accuracy", "test exit0 accuracy", "test rate0 agreement"} <= set(manifest.scores)
    assert len(manifest.bottleneck.rates) >= 3 and len(manifest.exits) >= 1 and manifest.thresholds


def test_only_listed_files_lie_in_the_folder(shipped: Bundle) -> None:
    assert {path.name for path in shipped.folder.iterdir()} == {*shipped.manifest.files, "manifest.json"}


def quantised(shipped: Bundle, photos: int) -> list[list[Integers]]:
    """Integers of real photos at every rate, as the device computes them."""
    head, codec, found = Head(shipped, 1), shipped.codec(), []
    for path in load("calibration").paths[:photos]:
        x_CHW = preprocess(open_image(path.read_bytes()), shipped.manifest.preprocessing)
        for index in range(head.exits):
            x_CHW, _ = head.segment(index, x_CHW)
        latent_CHW = head.encode(x_CHW)
        found.append([codec.quantise(latent_CHW, rate) for rate in range(len(codec.rates))])
    return found


def test_real_size_is_the_ideal_one(shipped: Bundle) -> None:
    codec = shipped.codec()
    for integers in quantised(shipped, 12):
        for rate, integers_CHW in enumerate(integers):
            ideal_bytes = codec.ideal_bits(integers_CHW, rate) / 8
            assert len(codec.encode(integers_CHW, rate)) <= 1.02 * ideal_bytes + 32


DECODE = """
import hashlib, sys, numpy as np
from pathlib import Path
from models.bundle import Bundle
codec = Bundle.open(sys.argv[1]).codec()
for line in sys.stdin:
    rate, data = line.split()
    print(hashlib.sha256(codec.decode(bytes.fromhex(data), int(rate)).astype('<i4').tobytes()).hexdigest())
"""


@pytest.mark.parametrize("threads", ["1", "2"])
def test_another_process_decodes_exactly(shipped: Bundle, threads: str) -> None:
    codec = shipped.codec()
    pairs = [(rate, q) for integers in quantised(shipped, 4) for rate, q in enumerate(integers)]
    lines = "".join(f"{rate} {codec.encode(integers_CHW, rate).hex()}\n" for rate, integers_CHW in pairs)
    result = subprocess.run(
        [sys.executable, "-c", DECODE, str(shipped.folder)],
        input=lines,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": threads},
        timeout=60,
        check=True,
    )
    expected = [hashlib.sha256(q.astype("<i4").tobytes()).hexdigest() for _, q in pairs]
    assert result.stdout.split() == expected


def test_head_and_tail_joined_are_the_unsplit_network(shipped: Bundle) -> None:
    """ONNX head on the device, PyTorch tail in the cloud, no quantisation between: the cloud model to 1e-4."""
    head, tail, split = Head(shipped, 1), Tail(shipped), load_split(shipped)
    for path in load("calibration").paths[:4]:
        image_CHW = preprocess(open_image(path.read_bytes()), shipped.manifest.preprocessing)
        features_CHW = image_CHW
        for index in range(head.exits):
            features_CHW, _ = head.segment(index, features_CHW)
        with torch.no_grad():
            joined_K = split.tail(torch.from_numpy(features_CHW)[None]).softmax(1)[0].numpy()
        np.testing.assert_allclose(joined_K, tail.answer_images([image_CHW])[0], atol=1e-4)


def test_payloads_of_shipped_bundles_are_golden(shipped: Bundle, request: pytest.FixtureRequest) -> None:
    """Old devices must be able to read new code's payloads: same integers, same bytes, for ever."""
    codec, rng = shipped.codec(), np.random.default_rng(0)
    digest = hashlib.sha256()
    for rate, tables in enumerate(codec.rates):
        spread_CHW = 0.3 * rng.normal(size=codec.shape_CHW).astype(np.float32) / tables.gain_C[:, None, None]
        digest.update(codec.encode(codec.quantise(spread_CHW, rate), rate))
    path = ROOT / "tests" / "golden" / f"zoo_{shipped.manifest.name}.sha256"
    if request.config.getoption("--regenerate-golden"):
        Path(path).write_text(digest.hexdigest() + "\n", encoding="utf-8")
    assert path.read_text(encoding="utf-8").strip() == digest.hexdigest()
