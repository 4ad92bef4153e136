from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from isthmus.models.errors import InvalidInput
from isthmus.models.recipes.common.trainer import Run
from isthmus.models.recipes.vision import own, own_data, own_training
from isthmus.models.recipes.vision.cutting import Captured, capture
from isthmus.models.recipes.vision.own_checks import WholeImage
from isthmus.models.vision.bundle import Bundle
from isthmus.models.vision.graph_tail import GraphTail
from isthmus.models.vision.head import Head
from isthmus.models.vision.manifest import Preprocessing
from isthmus.models.vision.tail import open_tail
from tests.unit.models.recipes.vision.own_nets import SIDE, factory

WIDE = (SIDE, 48)
SPEC = Preprocessing(resize=48, crop=WIDE, mean=(0.5,) * 3, deviation=(0.5,) * 3)
SHADES = {"bright": 200, "dark": 40}


@pytest.fixture(scope="module")
def captured() -> Captured:
    return capture(factory(), (3, *WIDE))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for name, shade in SHADES.items():
        (root / name).mkdir()
        for index in range(80):
            pixels = np.clip(rng.normal(shade, 30, (SIDE, SIDE, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{name}{index}.png")
    return root


@pytest.fixture(scope="module")
def made(captured: Captured, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, list[WholeImage]]:
    """A bundle of one epoch a stage."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("BOTTLENECK_EPOCHS", "DECODER_EPOCHS", "TAIL_EPOCHS"):
            patch.setattr(own_training, name, 1)
        settings = own.Settings("own", "mine", SPEC)
        run = Run(tmp_path_factory.mktemp("work"), 0)
        return own.make(tmp_path_factory.mktemp("zoo") / "own", run, "test", captured, own_data.find(folder), settings)


def test_the_cloud_answers_whole_images_as_the_model_does(made: tuple[Bundle, list[WholeImage]]) -> None:
    bundle, _ = made
    tail = open_tail(bundle)
    assert isinstance(tail, GraphTail)
    images = list(np.random.default_rng(1).normal(size=(5, 3, *WIDE)).astype(np.float32))
    with torch.inference_mode():
        wanted_BK = factory()(torch.from_numpy(np.stack(images))).softmax(1)
    np.testing.assert_allclose(tail.answer_images(images), wanted_BK, atol=1e-5)


def test_device_and_cloud_answer_through_real_bytes(made: tuple[Bundle, list[WholeImage]]) -> None:
    bundle, _ = made
    head, tail, codec = Head(bundle, 1), open_tail(bundle), bundle.codec(0)
    x_CHW = np.random.default_rng(1).normal(size=(3, *WIDE)).astype(np.float32)
    for index in range(head.exits):
        x_CHW, answer_K = head.segment(index, x_CHW)
        assert answer_K.shape == (2,)
    for rate in codec.rates:
        integers_CHW = codec.quantise(head.encode(0, x_CHW, 0), rate)
        latent_CHW = codec.dequantise(codec.decode(codec.encode(integers_CHW, rate), rate), rate)
        (answer_BK,) = tail.latents_to_tasks(0, [latent_CHW, latent_CHW], [rate, rate], [0])
        np.testing.assert_allclose(answer_BK.sum(1), 1, atol=1e-5)


def test_the_manifest_says_what_was_measured(made: tuple[Bundle, list[WholeImage]]) -> None:
    bundle, whole = made
    manifest = bundle.manifest
    assert [task.labels for task in manifest.tasks] == [("bright", "dark")]
    assert manifest.graphs is not None and manifest.weights is None
    assert "160 images of the user's, labelled; cut after first, second" in manifest.training.data
    assert manifest.scores["test cloud accuracy"].samples > own_data.LEAST
    assert whole[0].name == "JPEG of quality 75" and whole[0].mean_bytes > 100


def test_the_model_is_not_changed(made: tuple[Bundle, list[WholeImage]], captured: Captured) -> None:
    assert made
    for ours, theirs in zip(captured.graph.parameters(), factory().parameters(), strict=True):
        assert torch.equal(ours, theirs)


class Trained(Exception):
    """Training was reached."""


def test_a_retrained_model_does_not_resume_from_the_old_ones_checkpoints(
    captured: Captured, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(folder: Path, run: Run, *_: object) -> Bundle:
        (run.folder / "bottleneck.ckpt").write_bytes(b"")
        raise Trained(str(run.folder))

    monkeypatch.setattr(own, "build", build)
    retrained = factory()
    with torch.no_grad():
        next(iter(retrained.parameters())).add_(0.01)
    again, data = capture(retrained, (3, *WIDE)), own_data.find(folder)
    folders = []
    for each, cuts in ((captured, ()), (again, ()), (captured, ("second",)), (captured, ())):
        with pytest.raises(Trained) as caught:
            run = Run(tmp_path / "default", 0, apart=True)
            own.make(tmp_path / "b", run, "test", each, data, own.Settings("own", "mine", SPEC, cuts))
        folders.append(str(caught.value))
    assert len(set(folders)) == 3 and folders[0] == folders[3]
    with pytest.raises(Trained):
        own.make(tmp_path / "b", Run(tmp_path / "w", 0), "test", captured, data, own.Settings("own", "mine", SPEC))
    with pytest.raises(InvalidInput, match=r"another run \(model differ\): give another --work"):
        own.make(tmp_path / "b", Run(tmp_path / "w", 0), "test", again, data, own.Settings("own", "mine", SPEC))


def test_another_number_of_classes_is_refused(captured: Captured, folder: Path, tmp_path: Path) -> None:
    wrong = own_data.Folder(folder, own_data.find(folder).paths, ("a", "b", "c"))
    settings = own.Settings("own", "mine", SPEC)
    with pytest.raises(InvalidInput, match="has 3 sub-folders as classes, the model answers 2 classes"):
        own.make(tmp_path / "b", Run(tmp_path, 0), "test", captured, wrong, settings)
    assert not (tmp_path / "b").exists()
