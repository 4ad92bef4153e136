"""ELPV, end to end: fine-tune the cloud model, then distil exits and a bottleneck out of it, then write the bundle.

photographs -> EfficientNet-Lite2 (cloud) -> [frozen] -> exits + bottleneck (device) -> tables, thresholds -> bundle
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isthmus.models.recipes.common.fit_tables import fit
from isthmus.models.recipes.common.trainer import Run, Schedule
from isthmus.models.recipes.vision import baselines, export, light, single
from isthmus.models.recipes.vision.augment import random_affine, random_contrast, random_dihedral
from isthmus.models.recipes.vision.bridge import Bridge
from isthmus.models.recipes.vision.components import Components
from isthmus.models.recipes.vision.distil import Distillation, Weights, train_in_stages
from isthmus.models.recipes.vision.elpv_data import Photos, load
from isthmus.models.recipes.vision.heads import train_head
from isthmus.models.recipes.vision.imagenet import DEVIATION, MEAN, load_lite2
from isthmus.models.recipes.vision.rates import Rates, integers
from isthmus.models.recipes.vision.views import BATCH, Views
from isthmus.models.vision.bundle import Bundle
from isthmus.models.vision.efficientnet_lite import EfficientNetLite
from isthmus.models.vision.manifest import Architecture, Preprocessing, TapArchitecture, Task
from isthmus.models.vision.slim import SlimEncoder
from isthmus.models.vision.split import SplitClassifier
from isthmus.models.vision.tail import load_split

CLOUD_SIZES = ((10, 224), (18, 300))  # (until epoch, pixels): progressive resizing, EfficientNetV2 section 4.3
REFINE_EPOCHS = 12  # a second cosine cycle at full size, SGDR section 3: the first ends before the loss does
PREPROCESSING = Preprocessing(resize=300, crop=(300, 300), mean=(MEAN,) * 3, deviation=(DEVIATION,) * 3)
TASKS = (
    Task(name="defect", labels=("functional", "defective")),
    Task(name="cell_type", labels=("monocrystalline", "polycrystalline")),
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
BRIDGE_EPOCHS, RAMP_EPOCHS, DECODER_EPOCHS, TAIL_EPOCHS = 14, 5, 3, 8
RANGE_PHOTOS = 64  # that an int8 head's scales are found on


@dataclass(frozen=True)
class Batch:
    """Augmented photographs and the annotators' probability of a defect."""

    images_B3HW: Tensor
    defect_B: Tensor
    ramp: float = 1.0  # of the price of bytes


def normalise(images_BHW: Tensor) -> Tensor:
    """Grey values in [0, 1] -> what the network takes, B3HW, channels last."""
    grey_B1HW = ((images_BHW - MEAN) / DEVIATION).unsqueeze(1)
    return grey_B1HW.expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)


def batches(photos: Photos, size: int, generator: torch.Generator) -> Iterator[Batch]:
    """One epoch of augmented batches at `size` pixels, in random order; a last partial batch is left out."""
    order = torch.randperm(len(photos), generator=generator)
    for chosen in torch.split(order, BATCH):
        if len(chosen) < BATCH:
            return
        images_B1HW = torch.from_numpy(photos.images_NHW[chosen.numpy()]).float().div_(255).unsqueeze(1)
        images_B1HW = random_affine(random_dihedral(images_B1HW, generator), generator)
        if images_B1HW.shape[-1] != size:
            images_B1HW = F.interpolate(images_B1HW, size=(size, size), mode="bilinear", antialias=True)
        images_B1HW = random_contrast(images_B1HW, generator)
        yield Batch(normalise(images_B1HW[:, 0]), torch.from_numpy(photos.defect_N[chosen.numpy()]))


def soft_cross_entropy(logits_B2: Tensor, defect_B: Tensor) -> Tensor:
    """Cross-entropy against the annotators' doubt (0, 1/3, 2/3, 1) in place of a hard label."""
    log_p_B2 = logits_B2.float().log_softmax(1)
    return -(defect_B * log_p_B2[:, 1] + (1 - defect_B) * log_p_B2[:, 0]).mean()


def train_cloud(run: Run, photos: Photos) -> EfficientNetLite:
    """Fine-tune EfficientNet-Lite2 from ImageNet weights in two cycles; returns the averaged network in eval mode."""
    torch.manual_seed(run.seed)
    net = EfficientNetLite("efficientnet_lite2", classes=2, dropout=0.3)
    load_lite2(net)
    net.set_drop_path(0.1)
    net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def epoch_batches(epoch: int, generator: torch.Generator) -> Iterator[Batch]:
        size = next(pixels for until, pixels in CLOUD_SIZES if epoch < until)
        return batches(photos, size, generator)

    def loss_of(batch: Batch) -> tuple[Tensor, dict[str, float]]:
        with torch.autocast("cpu", torch.bfloat16):
            logits_B2 = net(batch.images_B3HW)
        right = (logits_B2.argmax(1) == (batch.defect_B >= 0.5)).float().mean()
        return soft_cross_entropy(logits_B2, batch.defect_B), {"right": right.item()}

    def refine_batches(epoch: int, generator: torch.Generator) -> Iterator[Batch]:
        return batches(photos, PREPROCESSING.crop[0], generator)

    steps = len(photos) // BATCH
    average = run.fit("cloud", net, epoch_batches, loss_of, Schedule(CLOUD_SIZES[-1][0], steps, peak_lr=5e-4))
    net.load_state_dict(average.state_dict())
    average = run.fit("refine", net, refine_batches, loss_of, Schedule(REFINE_EPOCHS, steps, peak_lr=3e-4))
    assert isinstance(average, EfficientNetLite)
    return average


def train_deep(run: Run, photos: Photos, cloud: EfficientNetLite) -> Distillation:
    """Distil exits and the deep tap out of the cloud model, in three stages; returns the averaged module."""
    torch.manual_seed(run.seed)
    split = SplitClassifier(ARCHITECTURE)
    split.backbone.load_state_dict(cloud.state_dict())
    module = Distillation(split, DEEP, Weights(DEEP_PER_KILOBYTE))
    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def bridge_batches(epoch: int, generator: torch.Generator) -> Iterator[Batch]:
        for batch in batches(photos, PREPROCESSING.crop[0], generator):
            yield replace(batch, ramp=min(epoch / RAMP_EPOCHS, 1.0))

    def decoder_batches(epoch: int, generator: torch.Generator) -> Iterator[Batch]:
        return batches(photos, PREPROCESSING.crop[0], generator)

    def loss_of(batch: Batch) -> tuple[Tensor, dict[str, float]]:
        target_B2 = torch.stack([1 - batch.defect_B, batch.defect_B], 1)
        return module.loss(batch.images_B3HW, target_B2, batch.ramp)

    epochs = (BRIDGE_EPOCHS, DECODER_EPOCHS, TAIL_EPOCHS)
    return train_in_stages(run, module, bridge_batches, decoder_batches, loss_of, epochs, len(photos) // BATCH)


def train_light(run: Run, photos: Photos, split: SplitClassifier) -> tuple[Views, Bridge]:
    """Slim the first blocks, then distil the light tap out of the finished network; fills the split's tap and heads."""
    split.requires_grad_(False)
    split.heads.requires_grad_(True)
    tap, built = split.tap(LIGHT), ARCHITECTURE.taps[LIGHT]
    teacher = light.Teacher(split, normalise, photos.defect_N)
    views, encoder, wanted = slimmed(run, photos, teacher)
    bridge = light.bridge(run, "light", views, teacher, built, encoder, wanted, LIGHT_PER_KILOBYTE)
    tap.slim.front.load_state_dict(encoder.front.state_dict())
    tap.slim.bottleneck.load_state_dict(bridge.encoder.state_dict())
    tap.decoder.load_state_dict(bridge.decoder.state_dict())
    assert tap.between is not None
    assert tap.tail is not None
    tap.between.load_state_dict(bridge.between.state_dict())
    tap.tail.load_state_dict(bridge.whole_tail().state_dict())
    head = train_head(run, "cell_type", split.heads[0], bridge, views, photos.cell_types_N)
    split.heads[0].load_state_dict(head.state_dict())
    return views, bridge


def slimmed(run: Run, photos: Photos, teacher: light.Teacher) -> tuple[Views, SlimEncoder, Components]:
    """Views with the widest front's features, the slimmed encoder, and the components it was trained to."""
    folder, built = run.folder / "views", ARCHITECTURE.taps[LIGHT]
    views = light.teach(folder, photos.images_NHW, teacher.split, normalise, run.seed)
    wanted = light.components(views, teacher.split, built, normalise)
    encoder = light.slim(run, views, teacher.split, built, wanted, normalise)
    return light.add_front(folder, encoder.front, normalise), encoder, wanted


def light_latent(encoder: nn.Module, width: int, images_BHW: Tensor) -> Tensor:
    """Latent of a batch of grey images, 0 to 255, at one width."""
    latent_BCHW: Tensor = encoder(normalise(images_BHW / 255), width)
    return latent_BCHW


def tap_tables(views: Views, split: SplitClassifier, deep: Rates, shallow: Rates) -> tuple[export.TrainedTap, ...]:
    """Integer tables of both taps; the light tap's hold for every width."""
    encoder = split.tap(LIGHT).encoder.eval()
    widths = range(len(ARCHITECTURE.taps[LIGHT].widths))
    each = [integers(views.passes[0]["images"], partial(light_latent, encoder, width), shallow) for width in widths]
    light_integers = [np.concatenate(rate) for rate in zip(*each, strict=True)]
    deep_integers = integers(views.passes[0]["features"], split.tap(DEEP).encoder.eval(), deep)
    return (
        export.TrainedTap("light", fit(light_integers, shallow.gains_RC), MAX_LIGHT_BYTES),
        export.TrainedTap("deep", fit(deep_integers, deep.gains_RC), MAX_DEEP_BYTES),
    )


def samples(photos: Photos, count: int | None = None) -> export.Samples:
    """The first `count` photographs (all when it is None) as the device's preprocessing gives them."""
    images = [
        np.ascontiguousarray(
            np.broadcast_to((grey_HW.astype(np.float32) / 255 - MEAN) / DEVIATION, (3, *grey_HW.shape))
        )
        for grey_HW in photos.images_NHW[:count]
    ]
    labels_TN = (photos.labels_N[:count], photos.cell_types_N[:count])
    return export.Samples([image.astype(np.float32) for image in images], labels_TN)


def make(folder: Path, run: Run, command: str) -> Bundle:
    """The whole recipe. Raises nothing of its own; interrupted, it goes on where its last epoch ended."""
    train = load("train")
    cloud = train_cloud(run, train)
    deep = train_deep(run, train, cloud).eval()
    views, bridge = train_light(run, train, deep.split)
    taps = tap_tables(views, deep.split, deep.rates, bridge.rates)
    return export.write(
        folder,
        export.Trained(deep.split, taps, TASKS, ARCHITECTURE, PREPROCESSING, samples(train, RANGE_PHOTOS).images),
        about={"name": "elpv", "licence": LICENCE},
        training={
            "command": command,
            "seed": run.seed,
            "seconds": run.seconds(),
            "data": f"ELPV (PyPI elpv-dataset), train part, {len(train)} photographs",
        },
        calibration=samples(load("calibration")),
        test=samples(load("test")),
    )


def train_baselines(bundle: Path, run: Run, methods: Sequence[str]) -> dict[str, dict[str, float]]:
    """Every setting of the methods (all when none is named) on the training part; returns each stage's last figures.

    The teacher is the bundle's own cloud model; its answers are kept in `run.folder / "views"`.
    """
    photos, split = load("train"), load_split(Bundle.open(bundle)).requires_grad_(False)
    teacher = light.Teacher(split, normalise, photos.defect_N)
    views = light.teach(run.folder / "views", photos.images_NHW, split, normalise, run.seed)
    for method in methods or (*baselines.SETTINGS, single.METHOD):
        if method == single.METHOD:
            views, encoder, wanted = slimmed(run, photos, teacher)
            single.train_all(run, views, teacher, ARCHITECTURE.taps[LIGHT], encoder, wanted)
        else:
            baselines.train_all(run, method, views, teacher)
    return run.last_figures()
