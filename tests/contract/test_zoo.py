"""Every bundle that ships: complete, within its size, consistent with its manifest, bit-exact in another process."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from isthmus.models.bundle.files import kind_of, read_manifest
from isthmus.models.codecs.context_model import Integers
from isthmus.models.language.checkpoint.bundle import LanguageManifest
from isthmus.models.language.checkpoint.checkpoint import Checkpoint
from isthmus.models.language.handoff.bundle import HandoffBundle
from isthmus.models.language.handoff.confidence_head import ConfidenceHead
from isthmus.models.language.onnx.exits import ExitWeights
from isthmus.models.language.router.bundle import RouterBundle
from isthmus.models.recipes.vision.elpv_data import load
from isthmus.models.vision.bundle import Bundle
from isthmus.models.vision.head import Head
from isthmus.models.vision.images import open_image, preprocess
from isthmus.models.vision.tail import load_split, open_tail
from tests.bench.processes import ROOT
from tests.bench.sc2_ways import uncapped

FOLDERS = sorted(path.parent for path in (ROOT / "models" / "zoo").glob("*/manifest.json"))
ZOO = [folder for folder in FOLDERS if kind_of(folder) is None]
DETECTORS = ("objects",)
MAX_ZOO_BYTES, MAX_STUDENT_BYTES = 120_000_000, 40_000_000
ROUTERS = (  # bundle, model and bits of the device
    ("smollm2-4-smollm2", "smollm2", 4),
    ("smollm2-8-smollm2", "smollm2", 8),
    ("student-4-smollm2", "student", 4),
)


@pytest.fixture(scope="module", params=ZOO, ids=lambda folder: folder.name)
def shipped(request: pytest.FixtureRequest) -> Bundle:
    return Bundle.open(request.param)


def test_the_zoo_is_complete_and_small() -> None:
    assert [folder.name for folder in FOLDERS] == [
        "elpv",
        "fashion",
        "objects",
        "photos",
        "smollm2",
        "smollm2-25",
        "smollm2-4-smollm2",
        "smollm2-8-smollm2",
        "student",
        "student-4-smollm2",
    ]
    assert sum(path.stat().st_size for path in (ROOT / "models" / "zoo").rglob("*") if path.is_file()) <= MAX_ZOO_BYTES


@pytest.mark.parametrize(("name", "depths"), [("smollm2", (15, 20)), ("smollm2-25", (25,))])
def test_exits_of_the_language_model_belong_to_it(name: str, depths: tuple[int, ...]) -> None:
    checkpoint, folder = Checkpoint.open("smollm2"), ROOT / "models" / "zoo" / name
    handoff = HandoffBundle.open(folder, checkpoint)
    manifest = handoff.manifest
    assert manifest.training.command.startswith("python -m models.recipes language") and manifest.training.seconds > 0
    assert manifest.name == name and len(manifest.rates) >= 4 and len(manifest.thresholds) >= 20
    assert handoff.depths == depths
    assert {path.name for path in folder.iterdir()} == {*manifest.files, "manifest.json"}
    weight_LOH, _ = handoff.kv_fill()
    assert weight_LOH.shape == (30 - depths[-1], 384, 576)
    for index in range(len(depths)):
        ExitWeights(handoff.exit(index), checkpoint).tensor("map.weight")
        ConfidenceHead.from_tensors(handoff.exit(index))


@pytest.mark.parametrize(("name", "device", "bits"), ROUTERS)
def test_router_bundles_are_of_the_language_model_with_itself_or_its_student(name: str, device: str, bits: int) -> None:
    checkpoint, folder = Checkpoint.open("smollm2"), ROOT / "models" / "zoo" / name
    bundle = RouterBundle.open(folder)
    manifest, weights = bundle.manifest, Checkpoint.open(device).fingerprint.hex()
    assert (manifest.name, manifest.device.bits, manifest.device.weights) == (name, bits, weights)
    assert manifest.cloud.weights == checkpoint.fingerprint.hex()
    assert manifest.cloud.tokenizer == checkpoint.tokenizer.fingerprint.hex()
    assert bundle.head is not None and len(bundle.levels) >= 10 and "test device alone" in manifest.scores
    assert manifest.training.command.startswith("python -m isthmus.models.recipes router")
    assert {path.name for path in folder.iterdir()} == {*manifest.files, "manifest.json"}
    assert 1 - min(level.certificate.epsilon for level in bundle.levels) >= 0.99, "the default quality is kept"


def test_the_student_is_small_and_has_its_teachers_tokenizer() -> None:
    teacher, student = Checkpoint.open("smollm2"), Checkpoint.open("student")
    folder = ROOT / "models" / "zoo" / "student"
    manifest = read_manifest(folder, LanguageManifest)
    assert student.tokenizer.fingerprint == teacher.tokenizer.fingerprint
    assert bytes.fromhex(manifest.base) == teacher.fingerprint and student.config.layers == len(manifest.layers)
    assert manifest.name == "student" and manifest.scores["agreement"].low >= 0.5
    assert {path.name for path in folder.iterdir()} == {*manifest.files, "manifest.json"}
    assert sum(path.stat().st_size for path in folder.iterdir()) <= MAX_STUDENT_BYTES


@pytest.fixture
def classifier(shipped: Bundle) -> Bundle:
    if shipped.manifest.name in DETECTORS:
        pytest.skip("a detector has boxes in place of probabilities, and no exits")
    return shipped


@pytest.mark.parametrize("name", DETECTORS)
def test_a_detector_says_how_it_was_made_and_what_each_way_reaches(name: str) -> None:
    manifest = Bundle.open(ROOT / "models" / "zoo" / name).manifest
    assert manifest.training.command.startswith(f"python -m isthmus.models.recipes {name}")
    assert manifest.training.seconds > 0 and manifest.calibration_samples >= 95
    rates = manifest.taps[0].widths[0].rates
    assert [rate.mean_bytes for rate in rates] == sorted(rate.mean_bytes for rate in rates)
    assert [rate.agreement for rate in rates] == sorted(rate.agreement for rate in rates)
    assert len(rates) >= 3 and rates[-1].agreement >= 0.8
    assert all(way.agreement == 1 for way in manifest.images if way.form == "png" and way.quality == 100)
    assert not any(threshold.answers for threshold in manifest.heads["fp32"].thresholds)


def test_manifest_has_its_training_command_and_its_scores(classifier: Bundle) -> None:
    manifest = classifier.manifest
    assert manifest.training.command.startswith("python -m models.recipes") and manifest.training.seconds > 0
    promised = {"test cloud accuracy"}
    promised |= {f"test {name} {exit_.name} accuracy" for name, head in manifest.heads.items() for exit_ in head.exits}
    promised |= {f"test cloud {task.name} accuracy" for task in manifest.tasks[1:]}
    for tap in manifest.taps:
        for width in tap.widths:
            assert len(width.rates) >= 3
            promised |= {f"test {tap.name} {width.width:g} rate{rate} agreement" for rate in range(len(width.rates))}
    assert promised <= set(manifest.scores)
    assert manifest.heads.keys() == {"fp32", "int8"} and all(head.thresholds for head in manifest.heads.values())


def test_the_folder_holds_only_listed_files(shipped: Bundle) -> None:
    assert {path.name for path in shipped.folder.iterdir()} == {*shipped.manifest.files, "manifest.json"}


def quantised(shipped: Bundle, photos: int) -> Iterator[tuple[int, int, Integers]]:
    """Tap, rate and integers of real photos at every width and rate, as the device computes them."""
    head, manifest = Head(shipped, 1), shipped.manifest
    codecs = [shipped.codec(tap) for tap in range(len(manifest.taps))]
    for path in load("calibration").paths[:photos]:
        features = [preprocess(open_image(path.read_bytes()), manifest.preprocessing)]
        for index in range(head.exits):
            features.append(head.segment(index, features[-1])[0])
        for tap, built in enumerate(manifest.architecture.taps):
            for width in range(len(built.widths)):
                latent_CHW = head.encode(tap, features[built.after], width)
                for rate in range(built.rates):
                    coded_rate, _ = codecs[tap].compress(latent_CHW, rate)
                    yield tap, coded_rate, codecs[tap].quantise(latent_CHW, coded_rate)


def test_the_coded_size_is_within_one_percent_of_the_ideal(shipped: Bundle) -> None:
    codecs = [shipped.codec(tap) for tap in range(len(shipped.manifest.taps))]
    for tap, rate, integers_CHW in quantised(shipped, 6):
        ideal_bytes = codecs[tap].ideal_bits(integers_CHW, rate) / 8
        assert len(codecs[tap].encode(integers_CHW, rate)) <= 1.01 * ideal_bytes + 4


DECODE = """
import hashlib, sys, numpy as np
from pathlib import Path
from isthmus.models.vision.bundle import Bundle
bundle = Bundle.open(sys.argv[1])
codecs = [bundle.codec(tap) for tap in range(len(bundle.manifest.taps))]
for line in sys.stdin:
    tap, rate, data = line.split()
    integers = codecs[int(tap)].decode(bytes.fromhex(data), int(rate))
    print(hashlib.sha256(integers.astype('<i4').tobytes()).hexdigest())
"""


@pytest.mark.parametrize("threads", ["1", "2"])
def test_another_process_decodes_exactly(shipped: Bundle, threads: str) -> None:
    codecs = [shipped.codec(tap) for tap in range(len(shipped.manifest.taps))]
    found = list(quantised(shipped, 4))
    lines = "".join(f"{tap} {rate} {codecs[tap].encode(integers, rate).hex()}\n" for tap, rate, integers in found)
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
    expected = [hashlib.sha256(q.astype("<i4").tobytes()).hexdigest() for _, _, q in found]
    assert result.stdout.split() == expected


def test_head_and_tail_joined_are_the_unsplit_network(shipped: Bundle) -> None:
    """ONNX head, then PyTorch tail, without quantisation in between, equal the cloud model to 1e-4."""
    if shipped.manifest.graphs:  # a network of graphs has no tail that takes features
        pytest.skip("a network of graphs has no tail that takes features")
    head, tail, split = Head(shipped, 1), open_tail(shipped), load_split(shipped)
    for path in load("calibration").paths[:4]:
        image_CHW = preprocess(open_image(path.read_bytes()), shipped.manifest.preprocessing)
        features_CHW = image_CHW
        for index in range(head.exits):
            features_CHW, _ = head.segment(index, features_CHW)
        with torch.no_grad():
            joined_K = split.tail(torch.from_numpy(features_CHW)[None]).softmax(1)[0].numpy()
        np.testing.assert_allclose(joined_K, tail.answer_images([image_CHW])[0], atol=1e-4)


def test_every_tap_answers_every_task_with_probabilities(classifier: Bundle) -> None:
    tail, manifest = open_tail(classifier), classifier.manifest
    for tap, rate, integers_CHW in quantised(classifier, 1):
        latent_CHW = classifier.codec(tap).dequantise(integers_CHW, rate)
        answers = tail.latents_to_tasks(tap, [latent_CHW], [rate], range(len(manifest.tasks)))
        assert [answer_1K.shape for answer_1K in answers] == [(1, len(task.labels)) for task in manifest.tasks]
        np.testing.assert_allclose([answer_1K.sum() for answer_1K in answers], 1, atol=1e-5)


def test_payloads_of_shipped_bundles_are_golden(shipped: Bundle, request: pytest.FixtureRequest) -> None:
    """Payloads stay readable across versions: the same integers give the same bytes."""
    rng, digest = np.random.default_rng(0), hashlib.sha256()
    for codec in (uncapped(shipped, tap) for tap in range(len(shipped.manifest.taps))):  # noise exceeds every cap
        for rate in codec.rates:
            some_CHW = np.rint(0.6 * rng.normal(size=codec.shape_CHW)).astype(np.int32)
            within_CHW = codec.quantise(codec.dequantise(some_CHW, rate), rate)  # limited to the range of the tables
            digest.update(codec.encode(within_CHW, rate))
    path = ROOT / "tests" / "golden" / f"zoo_{shipped.manifest.name}.sha256"
    if request.config.getoption("--regenerate-golden"):
        Path(path).write_text(digest.hexdigest() + "\n", encoding="utf-8")
    assert path.read_text(encoding="utf-8").strip() == digest.hexdigest()
