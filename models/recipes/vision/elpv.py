"""ELPV, end to end: fine-tune the cloud model, distil exits and bottlenecks from it, write the bundle.

photographs -> EfficientNet-Lite2 (cloud) -> [frozen] -> exits + bottleneck (device) -> tables, thresholds -> bundle
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from isthmus.models.recipes.common import origin
from isthmus.models.recipes.common.fit_tables import fit
from isthmus.models.recipes.common.trainer import Run
from isthmus.models.recipes.vision import baselines, export, light, single
from isthmus.models.recipes.vision.bottleneck import BottleneckModel
from isthmus.models.recipes.vision.components import Components
from isthmus.models.recipes.vision.distil import Distillation, train_in_stages
from isthmus.models.recipes.vision.elpv_cloud import PREPROCESSING, PhotoBatch, batches, normalise, train_cloud
from isthmus.models.recipes.vision.elpv_data import Photos, load
from isthmus.models.recipes.vision.heads import train_head
from isthmus.models.recipes.vision.imagenet import imagenet_file
from isthmus.models.recipes.vision.measure import Samples
from isthmus.models.recipes.vision.parts import Trained, TrainedTap
from isthmus.models.recipes.vision.rates import Rates, integers
from isthmus.models.recipes.vision.views import BATCH, Views
from isthmus.models.vision.architecture import Architecture, TapArchitecture
from isthmus.models.vision.bundle import Bundle
from isthmus.models.vision.efficientnet_lite import EfficientNetLite
from isthmus.models.vision.images import open_file, preprocess
from isthmus.models.vision.slim import SlimEncoder
from isthmus.models.vision.split import SplitClassifier
from isthmus.models.vision.tail import load_split
from isthmus.models.vision.tasks import ClassifyTask

TASKS = (
    ClassifyTask(name="defect", labels=("functional", "defective")),
    ClassifyTask(name="cell_type", labels=("monocrystalline", "polycrystalline")),
)
LICENCE = "CC BY-NC-SA 4.0 (trained on ELPV); ImageNet weights Apache-2.0"
# Price of a coded kilobyte at each rate, in units of cross-entropy.
LIGHT_PER_KILOBYTE = (50.0, 20.0, 8.0, 4.0, 2.4, 1.4, 0.8, 0.4)
DEEP_PER_KILOBYTE = (3.0, 1.0, 0.3, 0.1)
ARCHITECTURE = Architecture(
    builder="split_classifier",
    backbone="efficientnet_lite2",
    classes=tuple(len(task.labels) for task in TASKS),
    cuts=(8, 12),
    taps=(
        TapArchitecture(
            after=0,
            blocks=7,
            rejoin=9,
            own_tail=True,
            latent_channels=24,
            decoder_channels=128,
            rates=len(LIGHT_PER_KILOBYTE),
            widths=(0.5, 0.75, 1.0),
        ),
        TapArchitecture(after=2, latent_channels=16, decoder_channels=128, rates=len(DEEP_PER_KILOBYTE)),
    ),
)
LIGHT, DEEP = 0, 1  # taps
MAX_LIGHT_BYTES, MAX_DEEP_BYTES = 4096, 2048
BOTTLENECK_EPOCHS, RAMP_EPOCHS, DECODER_EPOCHS, TAIL_EPOCHS = 14, 5, 3, 8
RANGE_PHOTOS = 64  # for the scales of an int8 head


def train_deep(run: Run, photos: Photos, cloud: EfficientNetLite) -> Distillation:
    """Distil exits and the deep tap from the cloud model, in three stages; returns the averaged module."""
    torch.manual_seed(run.seed)
    split = SplitClassifier(ARCHITECTURE)
    split.backbone.load_state_dict(cloud.state_dict())
    module = Distillation(split, DEEP, DEEP_PER_KILOBYTE)
    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def bottleneck_batches(epoch: int, generator: torch.Generator) -> Iterator[PhotoBatch]:
        for batch in batches(photos, PREPROCESSING.crop[0], generator):
            yield replace(batch, ramp=min(epoch / RAMP_EPOCHS, 1.0))

    def decoder_batches(epoch: int, generator: torch.Generator) -> Iterator[PhotoBatch]:
        return batches(photos, PREPROCESSING.crop[0], generator)

    def loss_of(batch: PhotoBatch) -> tuple[Tensor, dict[str, float]]:
        target_B2 = torch.stack([1 - batch.defect_B, batch.defect_B], 1)
        return module.loss(batch.images_B3HW, target_B2, batch.ramp)

    epochs = (BOTTLENECK_EPOCHS, DECODER_EPOCHS, TAIL_EPOCHS)
    return train_in_stages(run, module, bottleneck_batches, decoder_batches, loss_of, epochs, len(photos) // BATCH)


def train_light(run: Run, photos: Photos, split: SplitClassifier) -> tuple[Views, BottleneckModel]:
    """Slim the first blocks, then distil the light tap from the trained network; fills the split's tap and heads."""
    split.requires_grad_(False)
    split.heads.requires_grad_(True)
    tap, built = split.tap(LIGHT), ARCHITECTURE.taps[LIGHT]
    teacher = light.Teacher(split, normalise, photos.defect_N)
    views, encoder, requested = slimmed(run, photos, teacher)
    bottleneck = light.train_bottleneck(run, "light", views, teacher, built, encoder, requested, LIGHT_PER_KILOBYTE)
    tap.slim.front.load_state_dict(encoder.front.state_dict())
    tap.slim.bottleneck.load_state_dict(bottleneck.encoder.state_dict())
    tap.decoder.load_state_dict(bottleneck.decoder.state_dict())
    assert tap.between is not None
    assert tap.tail is not None
    tap.between.load_state_dict(bottleneck.between.state_dict())
    tap.tail.load_state_dict(bottleneck.whole_tail().state_dict())
    head = train_head(run, "cell_type", split.heads[0], bottleneck, views, photos.cell_types_N)
    split.heads[0].load_state_dict(head.state_dict())
    return views, bottleneck


def slimmed(run: Run, photos: Photos, teacher: light.Teacher) -> tuple[Views, SlimEncoder, Components]:
    """Views with the widest front's features, the slimmed encoder, and the components that its latent represents."""
    folder, built = run.folder / "views", ARCHITECTURE.taps[LIGHT]
    views = light.teach(folder, photos.images_NHW, teacher.split, normalise, run.seed)
    requested = light.components(views, teacher.split, built, normalise)
    encoder = light.slim(run, views, teacher.split, built, requested, normalise)
    return light.add_front(folder, encoder.front, normalise), encoder, requested


def light_latent(encoder: nn.Module, width: int, images_BHW: Tensor) -> Tensor:
    """Latent of a batch of grey images, 0 to 255, at one width."""
    latent_BCHW: Tensor = encoder(normalise(images_BHW / 255), width)
    return latent_BCHW


def tap_tables(views: Views, split: SplitClassifier, deep: Rates, shallow: Rates) -> tuple[TrainedTap, ...]:
    """Integer tables of both taps; the light tap's are shared by all widths."""
    encoder = split.tap(LIGHT).encoder.eval()
    widths = range(len(ARCHITECTURE.taps[LIGHT].widths))
    each = [integers(views.passes[0]["images"], partial(light_latent, encoder, width), shallow) for width in widths]
    light_integers = [np.concatenate(rate) for rate in zip(*each, strict=True)]
    deep_integers = integers(views.passes[0]["features"], split.tap(DEEP).encoder.eval(), deep)
    return (
        TrainedTap("light", fit(light_integers, shallow.gains_RC), MAX_LIGHT_BYTES),
        TrainedTap("deep", fit(deep_integers, deep.gains_RC), MAX_DEEP_BYTES),
    )


def samples(photos: Photos) -> Samples:
    """Photographs as a device gets them."""
    opened = [partial(open_file, path) for path in photos.paths]
    return Samples(opened, (photos.labels_N, photos.cell_types_N))


def measuring_data() -> export.Data:
    """The parts that nothing is trained on."""
    return export.Data(samples(load("calibration")), samples(load("test")))


def hash_of(photos: Photos) -> str:
    """A hash of photographs and what is known of them."""
    return origin.of_arrays(photos.images_NHW, photos.defect_N, photos.poly_N)


def make(folder: Path, run: Run, command: str) -> Bundle:
    """The whole recipe. An interrupted run resumes after its last epoch."""
    train = load("train")
    run = run.of(recipe="elpv", data=hash_of(train), model=origin.of_files([imagenet_file()]))
    cloud = train_cloud(run, train)
    deep = train_deep(run, train, cloud).eval()
    views, bottleneck = train_light(run, train, deep.split)
    taps = tap_tables(views, deep.split, deep.rates, bottleneck.rates)
    return export.write(
        folder,
        Trained(
            deep.split,
            taps,
            TASKS,
            ARCHITECTURE,
            PREPROCESSING,
            [preprocess(photo(), PREPROCESSING) for photo in samples(train).photos[:RANGE_PHOTOS]],
        ),
        about={"name": "elpv", "licence": LICENCE},
        training={
            "command": command,
            "seed": run.seed,
            "seconds": run.seconds(),
            "data": f"ELPV (PyPI elpv-dataset), train part, {len(train)} photographs",
        },
        data=measuring_data(),
    )


def train_baselines(bundle: Path, run: Run, methods: Sequence[str]) -> dict[str, dict[str, float]]:
    """Train every setting of the methods (default: all) on the training part; returns each stage's last metrics.

    The teacher is the bundle's cloud model; its outputs are stored in `run.folder / "views"`.
    """
    photos, opened = load("train"), Bundle.open(bundle)
    run = run.of(recipe="baselines", data=hash_of(photos), model=opened.manifest.fingerprint)
    split = load_split(opened).requires_grad_(False)
    teacher = light.Teacher(split, normalise, photos.defect_N)
    views = light.teach(run.folder / "views", photos.images_NHW, split, normalise, run.seed)
    for method in methods or (*baselines.SETTINGS, single.METHOD):
        if method == single.METHOD:
            views, encoder, requested = slimmed(run, photos, teacher)
            single.train_all(run, views, teacher, ARCHITECTURE.taps[LIGHT], encoder, requested)
        else:
            baselines.train_all(run, method, views, teacher)
    return run.last_figures()
