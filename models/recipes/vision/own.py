"""A person's own classifier and a folder of images -> a bundle. The classifier itself stays exactly what it is.

    model --capture, cut--> blocks --distil--> exits + bottleneck + a tail of its own --calibrate--> bundle

The device gets ONNX graphs, and so does the cloud: neither needs the code that the model was written in.
"""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from isthmus.models.errors import InvalidInput
from isthmus.models.recipes.common.fit_tables import fit
from isthmus.models.recipes.common.trainer import Run
from isthmus.models.recipes.vision import export, own_data
from isthmus.models.recipes.vision.augment import random_affine, random_contrast
from isthmus.models.recipes.vision.components import find_components, start_decoder, start_projection
from isthmus.models.recipes.vision.cutting import Captured, Cut, blocks, places
from isthmus.models.recipes.vision.distil import Distillation, Weights, train_in_stages
from isthmus.models.recipes.vision.own_data import Images, normalise
from isthmus.models.recipes.vision.rates import integers
from isthmus.models.recipes.vision.views import BATCH
from isthmus.models.vision.blocks import Blocks
from isthmus.models.vision.bundle import Bundle
from isthmus.models.vision.manifest import Architecture, Preprocessing, TapArchitecture, Task
from isthmus.models.vision.split import SplitClassifier

BUILDER = "graphs"
BRIDGE_EPOCHS, RAMP_EPOCHS, DECODER_EPOCHS, TAIL_EPOCHS = 10, 4, 2, 4
ENOUGH_STEPS, MAX_REPEATS = 2500, 3  # of the bottleneck's training; epochs are repeated until there are so many
PRICES = (2.0, 0.8, 0.3, 0.1)  # of JPEG_SHARE, in units of cross-entropy
JPEG_SHARE = 0.1  # of a JPEG of quality 75: the bytes that prices are stated in
LATENT_CHANNELS, DECODER_CHANNELS = 32, 64  # of fewer channels, as many latents
LOG_GAINS = (-0.9, 0.5)  # of the dearest bytes and the cheapest, at first; a latent's mean variance is 1
COMPONENT_IMAGES = 256
HEAD_SHARE, FIRST_SHARE = 0.6, 0.5  # of the model's operations before the cut; of those, before an earlier exit
EPOCH_IMAGES = 8192  # at most: a larger folder is seen over several epochs
JPEG_IMAGES = 512  # whose mean size is the unit of prices
RANGE_IMAGES = 64  # that an int8 head's scales are found on
MAX_PAYLOAD = 1 << 16
ORDER_MARGIN = 0.3  # of the images: so many more right in another order is no chance


@dataclass(frozen=True)
class Settings:
    """What to call the bundle, its images, where it is cut (proposed when no cut is named), its question."""

    name: str
    licence: str
    preprocessing: Preprocessing
    cuts: tuple[str, ...] = ()
    task: str = "class"


def load_model(reference: str) -> nn.Module:
    """The module that `package.module:factory` makes, called without arguments.

    Raises InvalidInput when it cannot be imported, is not there, fails, or gives something else.
    """
    module_name, _, attribute = reference.partition(":")
    if not module_name or not attribute:
        raise InvalidInput(f"--model {reference!r}: expected package.module:factory")
    try:
        factory = getattr(importlib.import_module(module_name), attribute)
        model = factory()
    except Exception as error:  # it is not our code
        raise InvalidInput(f"--model {reference}: {type(error).__name__}: {str(error).splitlines()[:1]}") from error
    if not isinstance(model, nn.Module):
        raise InvalidInput(f"--model {reference} made a {type(model).__name__}, expected a torch.nn.Module")
    return model.float().eval()


def proposed(captured: Captured) -> tuple[str, ...]:
    """One or two cuts: the smallest feature map within HEAD_SHARE of the operations, and one for an earlier exit."""

    def smallest(share: float, of: int) -> Cut:
        within = [cut for cut in captured.cuts if cut.macs <= share * of] or list(captured.cuts[:1])
        return min(within, key=lambda cut: (cut.values, cut.macs))

    main = smallest(HEAD_SHARE, captured.macs)
    first = smallest(FIRST_SHARE, main.macs)
    return (first.name, main.name) if first.macs < main.macs else (main.name,)


def backbone(captured: Captured, cuts: Sequence[str]) -> Blocks:
    """The model's blocks; behind the last cut two more, if they can be, where features are compared in training."""
    behind = [cut.name for cut in captured.cuts[places(captured, cuts)[-1] + 1 :]]
    extra = sorted({len(behind) // 2, len(behind) - 1}) if len(behind) > 1 else range(len(behind))
    chosen = [*cuts, *(behind[index] for index in extra)]
    channels = {cut.name: cut.shape[0] for cut in captured.cuts}
    return Blocks(list(blocks(captured, chosen).children()), [channels[name] for name in chosen])


def architecture(captured: Captured, cuts: Sequence[str]) -> Architecture:
    """One tap behind the last cut, with a tail of its own."""
    (channels,) = (cut.shape[0] for cut in captured.cuts if cut.name == cuts[-1])
    tap = TapArchitecture(
        after=len(cuts),
        rejoin=len(cuts),
        own_tail=True,
        latent_channels=min(LATENT_CHANNELS, channels),
        decoder_channels=DECODER_CHANNELS,
        rates=len(PRICES),
    )
    places = tuple(range(1, len(cuts) + 1))
    return Architecture(builder=BUILDER, backbone="own", classes=(captured.classes,), cuts=places, taps=(tap,))


def batches(part: Images, targets_NK: Tensor, spec: Preprocessing, generator: torch.Generator) -> Iterator[Batch]:
    """One epoch in random order, of at most EPOCH_IMAGES; a last partial batch is left out."""
    order = torch.randperm(len(part), generator=generator)[:EPOCH_IMAGES]
    for start in range(0, len(order) - BATCH + 1, BATCH):
        chosen = order[start : start + BATCH]
        images_B3HW = torch.from_numpy(part.images_N3HW[chosen.numpy()]).float().div_(255)
        images_B3HW = random_contrast(random_affine(images_B3HW, generator), generator)
        yield Batch(normalised(images_B3HW, spec), targets_NK[chosen])


@dataclass(frozen=True)
class Batch:
    """Augmented images, and what they should be answered with."""

    images_B3HW: Tensor
    target_BK: Tensor
    ramp: float = 1.0  # of the price of bytes


def normalised(images_B3HW: Tensor, spec: Preprocessing) -> Tensor:
    """Values in [0, 1] -> what the network takes, channels last."""
    mean, deviation = (torch.tensor(x)[:, None, None] for x in (spec.mean, spec.deviation))
    return ((images_B3HW - mean) / deviation).contiguous(memory_format=torch.channels_last)


def train(run: Run, module: Distillation, part: Images, targets_NK: Tensor, spec: Preprocessing) -> Distillation:
    """Bottleneck and exits, then the decoder, then the tap's own tail; returns them averaged, in eval mode."""

    def loss_of(batch: Batch) -> tuple[Tensor, dict[str, float]]:
        return module.loss(batch.images_B3HW, batch.target_BK, batch.ramp)

    def epoch_batches(epoch: int, generator: torch.Generator) -> Iterator[Batch]:
        return batches(part, targets_NK, spec, generator)

    def ramped_batches(epoch: int, generator: torch.Generator) -> Iterator[Batch]:
        for batch in batches(part, targets_NK, spec, generator):
            yield Batch(batch.images_B3HW, batch.target_BK, min(epoch / RAMP_EPOCHS, 1.0))

    times = repeats(part)
    epochs = (times * BRIDGE_EPOCHS, times * DECODER_EPOCHS, times * TAIL_EPOCHS)
    return train_in_stages(run, module, ramped_batches, epoch_batches, loss_of, epochs, steps_of(part))


def start(split: SplitClassifier, part: Images, spec: Preprocessing) -> None:
    """Make the bottleneck the components of the features behind the last cut, as the answer weighs them, and back."""
    chosen = torch.randperm(len(part), generator=torch.Generator().manual_seed(0))[:COMPONENT_IMAGES].numpy()
    images_N3HW = torch.from_numpy(normalise(part.images_N3HW[chosen], spec))
    with torch.no_grad():
        features_NCHW = torch.cat([split.trunk(chunk_B3HW) for chunk_B3HW in torch.split(images_N3HW, BATCH)])
    rest = split.backbone.section(split.cuts[-1]).requires_grad_(False)
    tap = split.tap(0)
    found = find_components(features_NCHW, rest, tap.latent_channels)
    start_projection(tap.encoder, found)
    start_decoder(tap.decoder, found)


def steps_of(part: Images) -> int:
    """Batches of an epoch."""
    return min(len(part), EPOCH_IMAGES) // BATCH


def repeats(part: Images) -> int:
    """How many times the usual epochs: few images make short ones."""
    return min(max(round(ENOUGH_STEPS / (BRIDGE_EPOCHS * max(steps_of(part), 1))), 1), MAX_REPEATS)


def seconds_left(module: Distillation, part: Images, targets_NK: Tensor, spec: Preprocessing) -> float:
    """What all of `train` will take, from two steps of it."""
    each = []
    for batch, _ in zip(batches(part, targets_NK, spec, torch.Generator().manual_seed(0)), range(2), strict=False):
        started_s = time.perf_counter()
        module.train().loss(batch.images_B3HW, batch.target_BK)[0].backward()  # type: ignore[no-untyped-call]
        each.append(time.perf_counter() - started_s)
    module.zero_grad()
    return each[-1] * steps_of(part) * repeats(part) * (BRIDGE_EPOCHS + DECODER_EPOCHS + TAIL_EPOCHS)


def answers(split: SplitClassifier, part: Images, spec: Preprocessing) -> Tensor:
    """The model's own classes, (N,)."""
    with torch.inference_mode():
        return torch.cat(
            [
                split(torch.from_numpy(normalise(part.images_N3HW[start : start + BATCH], spec))).argmax(1)
                for start in range(0, len(part), BATCH)
            ]
        )


def check_order(answers_N: NDArray[np.int64], labels_N: NDArray[np.int64], names: Sequence[str]) -> None:
    """Raises InvalidInput when the answers would be much more often right were the classes in another order."""
    counts_KK = np.zeros((len(names), len(names)), np.int64)
    np.add.at(counts_KK, (answers_N, labels_N), 1)
    answered, meant = linear_sum_assignment(counts_KK, maximize=True)
    right, best = counts_KK.trace() / len(labels_N), counts_KK[answered, meant].sum() / len(labels_N)
    if best - right > ORDER_MARGIN:
        order = ", ".join(names[index] for index in meant)[:200]
        raise InvalidInput(
            f"the model is right on {right:.0%} of the labelled images, and would be on {best:.0%} if its classes"
            f" were {order}: sub-folders count in alphabetical order, so name them in"
            " the order of the model's classes (01-cat, 02-dog, ...)"
        )


def make(
    folder: Path, run: Run, command: str, captured: Captured, data: own_data.Folder, settings: Settings
) -> tuple[Bundle, dict[str, float]]:
    """The whole recipe: the bundle, and figures that its manifest does not hold.

    Raises InvalidInput when data and model do not fit each other. Interrupted, it goes on where its last epoch ended.
    """
    if data.classes and len(data.classes) != captured.classes:
        raise InvalidInput(
            f"{data.root} has {len(data.classes)} sub-folders as classes, the model answers {captured.classes} classes"
        )
    parts = own_data.load(data, settings.preprocessing)
    names = data.classes or tuple(f"class {index}" for index in range(captured.classes))
    what = "labelled" if data.classes else "unlabelled: accuracy is agreement with the model"
    bundle = build(
        folder, run, command, captured, parts, names, f"{len(data.paths)} images of the user's, {what}", settings
    )
    return bundle, {"jpeg75_bytes": own_data.jpeg_bytes(parts["test"].images_N3HW)}


def build(
    folder: Path,
    run: Run,
    command: str,
    captured: Captured,
    parts: Mapping[str, Images],
    names: tuple[str, ...],
    what: str,
    settings: Settings,
) -> Bundle:
    """Distil, calibrate, measure and write; `names` of the classes, `what` the images are."""
    spec, train_part = settings.preprocessing, parts["train"]
    cuts = settings.cuts or proposed(captured)
    built = architecture(captured, cuts)
    torch.manual_seed(run.seed)
    split = SplitClassifier(built, backbone(captured, cuts))
    split.eval()
    labels = {
        name: answers(split, part, spec).numpy() if part.labels_N is None else part.labels_N
        for name, part in parts.items()
    }
    if (true_N := parts["calibration"].labels_N) is not None:
        check_order(answers(split, parts["calibration"], spec).numpy(), true_N, names)
    targets_NK = torch.eye(captured.classes)[torch.from_numpy(labels["train"])]
    kilobyte_budget = JPEG_SHARE * own_data.jpeg_bytes(train_part.images_N3HW[:JPEG_IMAGES]) / 1024
    start(split, train_part, spec)
    module = Distillation(split, 0, Weights(tuple(price / kilobyte_budget for price in PRICES)), LOG_GAINS)
    minutes = seconds_left(module, train_part, targets_NK, spec) / 60
    print(f"training takes about {minutes:.0f} minutes", file=sys.stderr)
    finished = train(run, module, train_part, targets_NK, spec).eval()
    split = finished.split.eval()

    def latent(images_B3HW: Tensor) -> Tensor:
        features_BCHW: Tensor = split.tap(0).encoder(split.trunk(normalised(images_B3HW / 255, spec)))
        return features_BCHW

    sent = integers(train_part.images_N3HW[:EPOCH_IMAGES], latent, finished.rates)
    tap = export.TrainedTap("bottleneck", fit(sent, finished.rates.gains_RC), MAX_PAYLOAD)
    ranges = [normalise(image_3HW, spec) for image_3HW in train_part.images_N3HW[:RANGE_IMAGES]]
    return export.write(
        folder,
        export.Trained(split, (tap,), (Task(name=settings.task, labels=names),), built, spec, ranges),
        about={"name": settings.name, "licence": settings.licence},
        training={
            "command": command,
            "seed": run.seed,
            "seconds": run.seconds(),
            "data": f"{what}; cut behind {', '.join(cuts)}",
        },
        calibration=own_data.samples(parts["calibration"], labels["calibration"], spec),
        test=own_data.samples(parts["test"], labels["test"], spec),
    )


def table(captured: Captured, chosen: Sequence[str], image_values: int) -> list[str]:
    """Where the model can be cut: the share of its operations and time before, and the values that cross.

    Cuts that more values cross than an earlier one are left out unless they are chosen.
    """
    lines = ["  cut                               shape           MMAC   share    ms   values, of the image's"]
    least = captured.cuts[0].values
    for cut in captured.cuts:
        if cut.values > least and cut.name not in chosen:
            continue
        least = min(least, cut.values)
        mark = ">" if cut.name in chosen else " "
        shape = "x".join(map(str, cut.shape))
        lines.append(
            f"{mark} {cut.name:<32}  {shape:<12} {cut.macs / 1e6:7.1f}  {cut.macs / captured.macs:5.0%}"
            f"  {1000 * cut.seconds:6.1f}  {cut.values:8} {cut.values / image_values:5.0%}"
        )
    if left_out := len(captured.cuts) + 1 - len(lines):
        lines.append(f"  and {left_out} more, which more values cross than an earlier one")
    return lines
