"""Fashion-MNIST by a small vision transformer: three exits for tokens on the device, and tokens across the cut.

    60,000 greys of 28x28 -> SmallVit with exits (stage one) --recipes.own--> exits again, bottleneck -> bundle

LGViT's two stages: network and exits together, then the exits alone, distilled from the network that stays as it is.
"""

from __future__ import annotations

from pathlib import Path

from torch import nn

from isthmus.models.recipes.common import origin
from isthmus.models.recipes.common.trainer import Run
from isthmus.models.recipes.vision import own, small_vit
from isthmus.models.recipes.vision.cutting import capture
from isthmus.models.recipes.vision.fashion import LABELS, PREPROCESSING, SIDE, load
from isthmus.models.recipes.vision.parts import halve
from isthmus.models.vision.bundle import Bundle

CUTS = tuple(f"layers.{number - 1}" for number in small_vit.EXITS)
EPOCHS = 24  # of at most `own_training.EPOCH_IMAGES` images


def make(folder: Path, run: Run, command: str, data: Path) -> Bundle:
    """The whole recipe. Raises InvalidInput when the data cannot be downloaded. An interrupted run resumes."""
    parts = load(data)
    train = parts["train"]
    run = run.of(recipe="fashion-vit", data=origin.of_arrays(train.images_N3HW, train.labels_N))
    stage_one = small_vit.train(run, train, PREPROCESSING, len(LABELS), EPOCHS)
    halve(stage_one.net)  # so that its graphs can be stored in float16 without loss
    captured = capture(stage_one.net, (3, SIDE, SIDE))
    exits = stage_one.exits
    assert isinstance(exits, nn.ModuleList)
    licence = "MIT (Fashion-MNIST)"
    settings = own.Settings("fashion-vit", licence, PREPROCESSING, CUTS, task="garment", exits=exits)
    return own.build(folder, run, command, captured, parts, LABELS, "Fashion-MNIST, 50,000 labelled images", settings)
