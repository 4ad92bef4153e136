from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from isthmus.models.recipes.common.trainer import Run
from isthmus.models.recipes.vision import photos
from isthmus.models.vision.bundle import Bundle
from isthmus.models.vision.efficientnet_lite import EfficientNetLite
from isthmus.models.vision.head import Head
from isthmus.models.vision.images import preprocess
from isthmus.models.vision.manifest import Preprocessing
from isthmus.models.vision.tail import open_tail

SIDE = 64


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle from sixteen noisy photographs and five labelled ones, one epoch a stage, at 64 pixels."""
    root, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for part, count in (("data", 16), ("labelled", 5)):
        (root / part).mkdir()
        for index in range(count):
            pixels = rng.integers(0, 256, (26, 26, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize((208, 208)).save(root / part / f"{index:03}_noise.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(photos, "EPOCHS", 1)
        narrow = photos.ARCHITECTURE.taps[0].model_copy(update={"latent_channels": 16})
        patch.setattr(photos, "ARCHITECTURE", photos.ARCHITECTURE.model_copy(update={"taps": (narrow,)}))
        patch.setattr(photos, "SIDE", SIDE)
        patch.setattr(photos, "PREPROCESSING", small())
        return photos.make(root / "bundle", Run(root / "work", 0), "test", root / "data", root / "labelled")


def small() -> Preprocessing:
    return photos.PREPROCESSING.model_copy(update={"resize": SIDE, "crop": (SIDE, SIDE)})


def test_training_sees_photos_as_the_device_preprocesses_them() -> None:
    pixels_HW3 = np.random.default_rng(0).integers(0, 256, (photos.SIDE, photos.SIDE, 3), dtype=np.uint8)
    trained_CHW = photos.normalise(torch.from_numpy(pixels_HW3.transpose(2, 0, 1).copy())[None].float() / 255)[0]
    np.testing.assert_allclose(trained_CHW, preprocess(Image.fromarray(pixels_HW3), photos.PREPROCESSING), atol=1e-5)


def test_the_cloud_answers_whole_photos_as_imagenet_s_network(made: Bundle) -> None:
    net = EfficientNetLite("efficientnet_lite2", 1000)
    photos.load_lite2(net)
    image_3HW = np.random.default_rng(1).normal(size=(3, SIDE, SIDE)).astype(np.float32)
    with torch.inference_mode():
        wanted_K = net.eval()(torch.from_numpy(image_3HW)[None]).softmax(1)[0]
    np.testing.assert_allclose(open_tail(made).answer_images([image_3HW])[0], wanted_K, atol=2e-3)  # stored in 16 bits


def test_the_bottleneck_starts_near_the_features_that_it_carries(made: Bundle) -> None:
    """Sixteen photographs and one epoch teach nothing: what is right comes of the components."""
    head, tail, codec = Head(made, 1), open_tail(made), made.codec(0)
    with Image.open(made.folder.parent / "data" / "003_noise.png") as image:
        x_CHW = preprocess(image.convert("RGB"), made.manifest.preprocessing)
    wanted_K = tail.answer_images([x_CHW])[0]
    rate = codec.rates[-1]
    features_CHW, exit_K = head.segment(0, x_CHW)
    sent = codec.encode(codec.quantise(head.encode(0, features_CHW, 0), rate), rate)
    got_K = tail.answer_latents(0, [codec.dequantise(codec.decode(sent, rate), rate)], [rate])[0]
    apart, chance = np.abs(got_K - wanted_K).sum(), np.abs(exit_K - wanted_K).sum()
    assert apart < 0.7 * chance


def test_the_exit_is_made_of_the_network_s_own_blocks(made: Bundle) -> None:
    net = EfficientNetLite("efficientnet_lite2", 1000)
    photos.load_lite2(net)
    x_CHW = image_3HW = np.random.default_rng(1).normal(size=(3, SIDE, SIDE)).astype(np.float32)
    ((cut,), (blocks,)) = photos.ARCHITECTURE.cuts, photos.ARCHITECTURE.exit_blocks
    with torch.inference_mode():
        x_BCHW = torch.from_numpy(image_3HW)[None]
        for block in (*range(cut), *blocks):
            x_BCHW = net.eval().blocks[block](x_BCHW)
    _, answer_K = Head(made, 1).segment(0, x_CHW)
    np.testing.assert_allclose(answer_K, x_BCHW.softmax(1)[0], atol=5e-3)  # stored in 16 bits


def test_the_manifest_names_a_thousand_classes_and_its_data(made: Bundle) -> None:
    manifest = made.manifest
    assert len(manifest.tasks[0].labels) == 1000 and manifest.tasks[0].labels[:2] == ("tench", "goldfish")
    assert manifest.training.data.startswith("17 photographs, 0 objects")  # a labelled one among them
    assert manifest.scores["test cloud accuracy"].samples == 3
