from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from isthmus.models.recipes.common.trainer import Run
from isthmus.models.recipes.vision import light, views
from isthmus.models.recipes.vision.bottleneck import BottleneckModel
from isthmus.models.recipes.vision.components import Components
from isthmus.models.recipes.vision.light import Teacher
from isthmus.models.recipes.vision.views import Views
from isthmus.models.vision.split import SplitClassifier
from tests.tiny_bundle import TINY

PHOTOS, SIDE = 32, 64
TAP = TINY.taps[0]


def normalise(grey_BHW: Tensor) -> Tensor:
    return ((grey_BHW - 0.5) / 0.5).unsqueeze(1).expand(-1, 3, -1, -1).contiguous()


@pytest.fixture(scope="module")
def teacher(tiny_split: SplitClassifier) -> Teacher:
    return Teacher(tiny_split, normalise, (np.arange(PHOTOS) % 2).astype(np.float32))


@pytest.fixture(scope="module")
def patched() -> Iterator[None]:
    """One view a photograph, and one epoch a stage."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(views, "VIEWS", 1)
        for name in ("SLIM_EPOCHS", "BOTTLENECK_EPOCHS", "REFINE_EPOCHS"):
            patch.setattr(light, name, 1)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("views")


@pytest.fixture(scope="module")
def taught(patched: None, teacher: Teacher, folder: Path) -> Views:
    images_NHW = np.random.default_rng(0).integers(0, 256, (PHOTOS, SIDE, SIDE), dtype=np.uint8)
    return light.teach(folder, images_NHW, teacher.split, normalise, 0)


@pytest.fixture(scope="module")
def wanted(taught: Views, teacher: Teacher) -> Components:
    return light.components(taught, teacher.split, TAP, normalise)


def test_the_teachers_outputs_are_those_of_the_unsplit_network(taught: Views, teacher: Teacher) -> None:
    arrays = taught.passes[0]
    assert set(arrays) == {"images", "features", "middle", "last", "logits"}
    images_BHW = torch.from_numpy(np.array(arrays["images"][:4])).float() / 255
    with torch.no_grad():
        features_BCHW = teacher.split.trunk(normalise(images_BHW))
    found_BCHW, found_BK = (torch.from_numpy(np.array(arrays[name][:4])).float() for name in ("features", "logits"))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits_BK = teacher.split.tail(found_BCHW)
    assert (found_BCHW - features_BCHW).square().mean() < 1e-3 * features_BCHW.var()
    torch.testing.assert_close(found_BK, logits_BK.float(), atol=0.03, rtol=0.03)


def test_there_are_as_many_components_as_latent_channels(wanted: Components) -> None:
    assert wanted.deviation_L.shape == (TAP.latent_channels,)
    assert float(wanted.deviation_L.square().mean()) == pytest.approx(1, rel=1e-3)


def test_an_encoder_and_its_bottleneck_are_trained(
    taught: Views, teacher: Teacher, wanted: Components, folder: Path, tmp_path: Path
) -> None:
    run = Run(tmp_path, 0)
    encoder = light.slim(run, taught, teacher.split, TAP, wanted, normalise)
    assert encoder.widths == TAP.widths and not encoder.training
    fronted = light.add_front(folder, encoder.front, normalise)
    assert "front" in fronted.passes[0]
    model = light.train_bottleneck(run, "light", fronted, teacher, TAP, encoder, wanted, (4.0, 1.0, 0.4))
    assert isinstance(model, BottleneckModel) and not model.training
    assert {path.name for path in tmp_path.glob("*.ckpt")} == {"slim.ckpt", "light.ckpt", "light-refine.ckpt"}
    with torch.no_grad():
        latent_BCHW = model.encoder(torch.from_numpy(np.array(fronted.passes[0]["front"][:2])).float(), -1)
        decoded_BCHW = model.decode(latent_BCHW, torch.zeros(2, dtype=torch.long))
    assert latent_BCHW.shape[1] == TAP.latent_channels
    assert decoded_BCHW.shape[1:] == taught.passes[0]["features"].shape[1:]
