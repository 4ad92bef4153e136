"""A user's own classifier and a folder of images -> a bundle. The classifier itself does not change.

    model --capture, cut--> blocks --distil--> exits, bottleneck, tail for decoded features --calibrate--> bundle

Both device and cloud get ONNX graphs, and need none of the model's code.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from isthmus.models.errors import InvalidInput
from isthmus.models.recipes.common import origin
from isthmus.models.recipes.common.fit_tables import fit
from isthmus.models.recipes.common.trainer import Run
from isthmus.models.recipes.vision import export, own_data
from isthmus.models.recipes.vision.cutting import Captured, cut_indices
from isthmus.models.recipes.vision.distil import Distillation
from isthmus.models.recipes.vision.exit_heads import token_exits
from isthmus.models.recipes.vision.own_checks import WholeImage, check_order, find_warnings, logits_of, whole_images
from isthmus.models.recipes.vision.own_data import Images, normalise
from isthmus.models.recipes.vision.own_model import PRICES, architecture, backbone, proposed
from isthmus.models.recipes.vision.own_training import EPOCH_IMAGES, answers, normalised, seconds_left, start, train
from isthmus.models.recipes.vision.parts import Trained, TrainedTap
from isthmus.models.recipes.vision.rates import integers
from isthmus.models.vision.bundle import Bundle
from isthmus.models.vision.manifest import Preprocessing
from isthmus.models.vision.split import SplitClassifier
from isthmus.models.vision.tasks import ClassifyTask

JPEG_SHARE = 0.1  # of the mean size of a JPEG of quality 75: the unit of PRICES
LOG_GAINS = (-0.9, 0.5)  # initial, of the highest and the lowest price; a latent's mean variance is 1
JPEG_IMAGES = 512  # of which the mean JPEG size is measured
RANGE_IMAGES = 64  # for the scales of an int8 head
MAX_PAYLOAD = 1 << 16


@dataclass(frozen=True)
class Settings:
    """Name and licence of the bundle, preprocessing of its images, cuts (proposed if empty), name of the task."""

    name: str
    licence: str
    preprocessing: Preprocessing
    cuts: tuple[str, ...] = ()
    task: str = "class"
    exits: nn.ModuleList | None = None  # already trained; where there are none, those of the features that cross


def make(
    folder: Path, run: Run, command: str, captured: Captured, data: own_data.Folder, settings: Settings
) -> tuple[Bundle, list[WholeImage]]:
    """The whole recipe: the bundle, and what sending whole images would cost.

    Raises InvalidInput when data and model do not match, or the run's folder has checkpoints of another model, data or
    options. An interrupted run resumes after its last epoch.
    """
    if data.classes and len(data.classes) != captured.channels:
        raise InvalidInput(
            f"{data.root} has {len(data.classes)} sub-folders as classes, the model answers {captured.channels} classes"
        )
    parts = own_data.load(data, settings.preprocessing)
    run = run.of(
        recipe="split",
        model=origin.of_graph(captured.graph),
        data=origin.of_arrays(parts["train"].images_N3HW, parts["train"].labels_N),
        preprocessing=settings.preprocessing.model_dump_json(),
        cuts=" ".join(settings.cuts or proposed(captured)),
    )
    calibration = parts["calibration"]
    logits_NK = logits_of(captured.whole, calibration.images_N3HW, settings.preprocessing)
    for warning in find_warnings(logits_NK, calibration.labels_N):
        print(f"warning: {warning}", file=sys.stderr)
    names = data.classes or tuple(f"class {index}" for index in range(captured.channels))
    what = "labelled" if data.classes else "unlabelled: accuracy is agreement with the model"
    bundle = build(
        folder, run, command, captured, parts, names, f"{len(data.paths)} images of the user's, {what}", settings
    )
    return bundle, whole_images(captured.whole, parts["test"], settings.preprocessing)


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
    """Distil, calibrate, measure and write. `names`: of the classes; `what`: description of the data."""
    spec, train_part = settings.preprocessing, parts["train"]
    cuts = settings.cuts or proposed(captured)
    built = architecture(captured, cuts)
    torch.manual_seed(run.seed)
    split = SplitClassifier(built, backbone(captured, cuts))
    if settings.exits is not None:
        split.exits = settings.exits
    elif all(captured.is_tokens(index) for index in cut_indices(captured, cuts)):
        split.exits = token_exits([split.backbone.channels[cut - 1] for cut in split.cuts], captured.channels)
    split.eval()
    labels_N = answers(split, train_part, spec).numpy() if train_part.labels_N is None else train_part.labels_N
    if (true_N := parts["calibration"].labels_N) is not None:
        check_order(answers(split, parts["calibration"], spec).numpy(), true_N, names)
    targets_NK = torch.eye(captured.channels)[torch.from_numpy(labels_N)]
    finished = distilled(run, split, train_part, targets_NK, spec)
    split, tap = finished.split.eval(), trained_tap(finished, train_part, spec)
    ranges = [normalise(image_3HW, spec) for image_3HW in train_part.images_N3HW[:RANGE_IMAGES]]
    return export.write(
        folder,
        Trained(split, (tap,), (ClassifyTask(name=settings.task, labels=names),), built, spec, ranges),
        about={"name": settings.name, "licence": settings.licence},
        training={
            "command": command,
            "seed": run.seed,
            "seconds": run.seconds(),
            "data": f"{what}; cut after {', '.join(cuts)}",
        },
        data=export.Data(own_data.samples(parts["calibration"]), own_data.samples(parts["test"])),
    )


def distilled(run: Run, split: SplitClassifier, part: Images, targets_NK: Tensor, spec: Preprocessing) -> Distillation:
    """Exits and bottleneck trained on a part, in eval mode; prints how long that takes first."""
    kilobyte_budget = JPEG_SHARE * own_data.jpeg_bytes(part.images_N3HW[:JPEG_IMAGES]) / 1024
    start(split, part, spec)
    module = Distillation(split, 0, tuple(price / kilobyte_budget for price in PRICES), LOG_GAINS)
    minutes = seconds_left(module, part, targets_NK, spec) / 60
    print(f"training takes about {minutes:.0f} minutes", file=sys.stderr)
    return train(run, module, part, targets_NK, spec).eval()


def trained_tap(finished: Distillation, part: Images, spec: Preprocessing) -> TrainedTap:
    """The tap's integer tables, fitted to the integers of a part."""
    split = finished.split.eval()

    def latent(images_B3HW: Tensor) -> Tensor:
        features_BCHW: Tensor = split.tap(0).encoder(split.trunk(normalised(images_B3HW / 255, spec)))
        return features_BCHW

    sent = integers(part.images_N3HW[:EPOCH_IMAGES], latent, finished.rates)
    return TrainedTap("bottleneck", fit(sent, finished.rates.gains_RC), MAX_PAYLOAD)
