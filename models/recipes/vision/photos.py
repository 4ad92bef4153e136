"""Any photo: EfficientNet-Lite2 with ImageNet's 1,000 classes, split and distilled without labels.

unlabelled views -> EfficientNet-Lite2 (as it is) -> [frozen] -> bottleneck (device) -> tables -> bundle

The network is not trained: the device runs its first blocks, the cloud the others, with the original weights. The exit
is not trained either: it runs some of the later blocks and skips most residual ones, which residual networks tolerate
(Veit et al., "Residual Networks Behave Like Ensembles of Relatively Shallow Networks", NeurIPS 2016). A small head
distilled on these photographs recognised 1 % of ImageNet's objects, this exit 58 %.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import deepcopy
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from isthmus.models.recipes.common import origin
from isthmus.models.recipes.common.fit_tables import fit
from isthmus.models.recipes.common.trainer import Run, Schedule
from isthmus.models.recipes.vision import export, photos_data
from isthmus.models.recipes.vision.bottleneck import BottleneckModel, DistilBatch, new_bottleneck, ramp
from isthmus.models.recipes.vision.components import find_components, start_decoder, start_projection
from isthmus.models.recipes.vision.distil import tail_points
from isthmus.models.recipes.vision.imagenet import DEVIATION, MEAN, class_names, load_lite2
from isthmus.models.recipes.vision.measure import Samples
from isthmus.models.recipes.vision.parts import Trained, TrainedTap
from isthmus.models.recipes.vision.photos_data import labelled
from isthmus.models.recipes.vision.rates import integers
from isthmus.models.recipes.vision.views import BATCH, Views, extend
from isthmus.models.vision.architecture import Architecture, TapArchitecture
from isthmus.models.vision.bundle import Bundle
from isthmus.models.vision.efficientnet_lite import EfficientNetLite, fuse_batch_norms
from isthmus.models.vision.images import open_file
from isthmus.models.vision.manifest import Preprocessing
from isthmus.models.vision.split import SplitClassifier
from isthmus.models.vision.tasks import ClassifyTask

SIDE = 260
PREPROCESSING = Preprocessing(resize=SIDE, crop=(SIDE, SIDE), mean=(MEAN,) * 3, deviation=(DEVIATION,) * 3)
LICENCE = "Apache-2.0 (ImageNet weights of EfficientNet-Lite2)"
# Price of a coded kilobyte at each rate, in units of cross-entropy.
PER_KILOBYTE = (6.0, 3.0, 1.5, 0.7, 0.3, 0.12)
ARCHITECTURE = Architecture(
    builder="split_classifier",
    backbone="efficientnet_lite2",
    classes=(1000,),
    cuts=(9,),
    exit_blocks=((9, 12, 16, 21, 22),),
    taps=(TapArchitecture(after=1, rejoin=9, latent_channels=48, decoder_channels=128, rates=len(PER_KILOBYTE)),),
)
COMPARED_AT = 16  # the block before which decoded features are compared with the network's
MAX_BYTES = 8192
EPOCHS, RAMP_EPOCHS = 16, 2
COMPONENT_VIEWS, RANGE_PHOTOS = 512, 64  # for the components, and for the scales of an int8 head


def normalise(images_B3HW: Tensor) -> Tensor:
    """Values in [0, 1] -> what the network takes, channels last."""
    return ((images_B3HW - MEAN) / DEVIATION).contiguous(memory_format=torch.channels_last)


def teach(folder: Path, split: SplitClassifier) -> Views:
    """Views with the network's features at the cut and after it, and its logits."""
    (cut,) = split.cuts
    front, middle, tail = (
        fuse_batch_norms(deepcopy(split.backbone.section(start, stop)).eval())
        for start, stop in ((0, cut), (cut, COMPARED_AT), (COMPARED_AT, None))
    )

    def answers(images_B3HW: Tensor) -> Mapping[str, Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            front_BCHW = front(normalise(images_B3HW))
            features_BCHW = middle(front_BCHW)
            middle_BCHW, last_BCHW, logits_BK = tail_points(tail, features_BCHW)
        return {
            "front": front_BCHW,
            "features": features_BCHW,
            "middle": middle_BCHW,
            "last": last_BCHW,
            "logits": logits_BK,
        }

    return extend(folder, "teacher", answers)


def train_bottleneck(run: Run, views: Views, split: SplitClassifier) -> BottleneckModel:
    """Bottleneck, rates and decoder, from the components of the features; returns them averaged, in eval mode."""
    torch.manual_seed(run.seed)
    tap = split.tap(0)
    some_NCHW = torch.from_numpy(np.array(views.passes[0]["front"][-COMPONENT_VIEWS:])).float()
    rest = fuse_batch_norms(deepcopy(split.backbone.section(tap.rejoin)).eval()).requires_grad_(False)
    requested = find_components(some_NCHW, rest, tap.latent_channels)
    start_projection(tap.encoder, requested)
    module = new_bottleneck(split, ARCHITECTURE.taps[0], tap.encoder, PER_KILOBYTE, COMPARED_AT, settled=False)
    start_decoder(module.decoder, requested)
    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def batches(epoch: int, generator: torch.Generator) -> Iterator[DistilBatch]:
        for _, arrays in views.batches(generator, ["front", "features", "middle", "last", "logits"]):
            wanted_BK = arrays["logits"].softmax(1)
            yield DistilBatch(
                inputs_BCHW=arrays["front"],
                features_BCHW=arrays["features"],
                middle_BCHW=arrays["middle"],
                last_BCHW=arrays["last"],
                wanted_BK=wanted_BK,
                target_BK=wanted_BK,
                ramp=ramp(epoch, RAMP_EPOCHS),
            )

    # The stage's name seeds its randomness, and the shipped bundle was made with this one.
    average = run.fit("bridge", module, batches, module.loss, Schedule(EPOCHS, len(views) // BATCH, peak_lr=1e-3))
    assert isinstance(average, BottleneckModel)
    return average


def samples(folder: Path, part: str) -> Samples:
    """A part of the labelled photographs."""
    found = labelled(folder, part)
    return Samples([partial(open_file, path) for path in found.paths], (found.labels_N,))


def measuring_data(folder: Path) -> export.Data:
    """The labelled parts. Of the training part no label is trained on, and the exit is not trained: it may choose."""
    return export.Data(*(samples(folder, part) for part in ("calibration", "test", "train")))


def ranges(views: Views) -> list[NDArray[np.float32]]:
    """Some preprocessed training images."""
    images_NCHW = torch.from_numpy(np.array(views.passes[0]["images"][:RANGE_PHOTOS])).float() / 255
    return list(normalise(images_NCHW).contiguous().numpy())


def make(folder: Path, run: Run, command: str, photos: Path, labelled_photos: Path) -> Bundle:
    """The whole recipe; `photos` is filled from Debian packages if it does not exist.

    Raises InvalidInput when there are no photographs. An interrupted run resumes after its last epoch.
    """
    if not photos.exists():
        photos_data.fetch(photos)
    torch.manual_seed(run.seed)
    split = SplitClassifier(ARCHITECTURE)
    assert isinstance(split.backbone, EfficientNetLite)
    load_lite2(split.backbone)
    split.eval()
    sources = photos_data.find(photos, labelled(labelled_photos, "train").paths)
    run = run.of(
        recipe="photos",
        model=origin.of_arrays(*split.backbone.state_dict().values()),
        data=origin.of_files(dict.fromkeys(sources.rows)),
    )
    photos_data.draw(run.folder / "views", sources, SIDE, run.seed)
    views = teach(run.folder / "views", split)
    bottleneck = train_bottleneck(run, views, split)
    tap = split.tap(0)
    tap.encoder.load_state_dict(bottleneck.encoder.state_dict())
    tap.decoder.load_state_dict(bottleneck.decoder.state_dict())
    split.eval()
    sent = integers(np.asarray(views.passes[0]["front"]), tap.encoder, bottleneck.rates)
    taps = (TrainedTap("bottleneck", fit(sent, bottleneck.rates.gains_RC), MAX_BYTES),)
    names = ClassifyTask(name="object", labels=class_names())
    return export.write(
        folder,
        Trained(split, taps, (names,), ARCHITECTURE, PREPROCESSING, ranges(views)),
        about={"name": "photos", "licence": LICENCE},
        training={
            "command": command,
            "seed": run.seed,
            "seconds": run.seconds(),
            "data": f"{len(sources.photos)} photographs, {len(sources.objects)} objects; Debian packages, no labels",
        },
        data=measuring_data(labelled_photos),
    )
