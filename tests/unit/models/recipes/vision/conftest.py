"""A tiny network, exported and measured as a recipe does it."""

from __future__ import annotations

import copy
import warnings
from functools import partial

import numpy as np
import pytest
from PIL import Image

from isthmus.models.recipes.common.fit_tables import fit
from isthmus.models.recipes.vision import export
from isthmus.models.recipes.vision.measure import Measurements, Samples, measure
from isthmus.models.recipes.vision.parts import Trained, TrainedTap
from isthmus.models.vision.bundle import Bundle
from isthmus.models.vision.split import SplitClassifier
from isthmus.models.vision.tasks import ClassifyTask
from tests.tiny_bundle import GAINS, PREPROCESSING, TAPS, TASKS, TINY, random_images

LABELS = (np.arange(6) % 2, np.arange(6) % 3)


def random_samples(count: int, seed: int) -> Samples:
    """Smooth random photos with labels of no meaning."""
    pixels = [
        ((image_CHW + 1) * 127.5).round().astype(np.uint8).transpose(1, 2, 0)
        for image_CHW in random_images(count, seed)
    ]
    return Samples([partial(Image.fromarray, each) for each in pixels], [labels_N[:count] for labels_N in LABELS])


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory, tiny_split: SplitClassifier) -> Bundle:
    """The tiny network, exported and measured as a recipe does it."""
    rng = np.random.default_rng(0)
    taps = []
    for name, built in zip(TAPS, TINY.taps, strict=True):
        gains_RC = np.repeat(np.array(GAINS[: built.rates], np.float32)[:, None], built.latent_channels, 1)
        integers = [rng.laplace(0, gain, (8, built.latent_channels, 8, 8)) for gain in GAINS[: built.rates]]
        tables = fit([np.rint(rate_NCHW).astype(np.int32) for rate_NCHW in integers], gains_RC)
        taps.append(TrainedTap(name, tables, 4096))
    trained = Trained(
        copy.deepcopy(tiny_split),
        tuple(taps),
        tuple(ClassifyTask(name=name, labels=labels) for name, labels in TASKS),
        TINY,
        PREPROCESSING,
        random_images(4, seed=3),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's ONNX exporter warns of itself and of shapes it takes as constants
        return export.write(
            tmp_path_factory.mktemp("zoo") / "tiny",
            trained,
            about={"name": "tiny", "licence": "none: random weights"},
            training={"command": "tests", "seed": 0, "seconds": 0.0, "data": "none"},
            data=export.Data(random_samples(6, seed=1), random_samples(4, seed=2)),
        )


@pytest.fixture(scope="session")
def measured(bundle: Bundle) -> Measurements:
    """The calibration samples, answered again by what the bundle ships."""
    return measure(bundle, random_samples(6, seed=1), "again")
