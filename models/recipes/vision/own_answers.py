"""A user's own detector, segmenter or embedder and a folder of images without labels -> a bundle.

    module --capture, cut--> trunk | rest --answer_training--> bottleneck between them --answer_export--> bundle

The network does not change. Its own answers are the reference; exits there are none.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from isthmus.models.errors import InvalidInput
from isthmus.models.recipes.common import origin
from isthmus.models.recipes.common.trainer import Run
from isthmus.models.recipes.vision import answer_export, own_data
from isthmus.models.recipes.vision.answer_distil import FromLatent
from isthmus.models.recipes.vision.answer_training import BottleneckRun, Halves, Plan
from isthmus.models.recipes.vision.cut_bytes import candidates, measured_bytes
from isthmus.models.recipes.vision.cutting import Captured, blocks
from isthmus.models.recipes.vision.own_data import Images, normalise
from isthmus.models.recipes.vision.own_model import PRICES
from isthmus.models.recipes.vision.views import BATCH, Views, draw_views
from isthmus.models.vision.bundle import Bundle
from isthmus.models.vision.manifest import Preprocessing
from isthmus.models.vision.tasks import AnyTask

SHARE = 0.8  # of the operations, before the cut: a detector sees things only after its neck
MEASURED_IMAGES = 8  # of which cuts are compared
NEAR = 1.1  # of the fewest bytes: among such cuts the earliest is proposed
LATENT, DECODER = 64, 64  # channels; a narrower map gives as many latents
LOG_GAINS = (-1.5, 0.0)  # initial, of the highest and the lowest price
JPEG_SHARE = 0.1  # of the mean size of a JPEG of quality 75: the unit of PRICES
JPEG_IMAGES, EPOCH_IMAGES = 128, 2048
STEPS, RAMP_SHARE = 3000, 0.15  # of training; of its epochs, while the price of bytes rises
LEAST_EPOCHS, MOST_EPOCHS = 8, 40
VIEWS = 2  # of an image: itself and mirrored
MAX_BYTES = 1 << 16


def images_of(data: own_data.Folder, spec: Preprocessing) -> Mapping[str, Images]:
    """The parts of a folder, whose sub-folders say nothing. Raises InvalidInput as `own_data.load` does."""
    return own_data.load(own_data.Folder(data.root, data.paths, (), data.splits, data.notes), spec)


def proposed(captured: Captured, part: Images, spec: Preprocessing) -> dict[str, float]:
    """Bytes of an image at the cuts that were measured; the proposal is the first."""
    images_N3HW = torch.from_numpy(normalise(part.images_N3HW[:MEASURED_IMAGES], spec))
    found = measured_bytes(captured, candidates(captured, SHARE), images_N3HW)
    least = min(found.values())
    best = next(index for index, size in found.items() if size <= NEAR * least)
    return {captured.cuts[index].name: found[index] for index in (best, *(each for each in found if each != best))}


def make(
    folder: Path,
    run: Run,
    command: str,
    captured: Captured,
    parts: Mapping[str, Images],
    cut: str,
    task: AnyTask,
    about: Mapping[str, str],
    spec: Preprocessing,
) -> Bundle:
    """The whole recipe; `about` has name and licence. Raises InvalidInput for a task that the network cannot answer.

    An interrupted run resumes after its last epoch.
    """
    if task.channels != captured.channels:
        raise InvalidInput(f"{task.channels} labels were given, the model answers {captured.channels}")
    train = parts["train"]
    held_out = [*parts["calibration"].paths, *parts["test"].paths]
    halves = halves_of(captured, cut)
    run = run.of(
        recipe="split",
        model=origin.of_graph(captured.graph),
        data=origin.of_arrays(train.images_N3HW),
        preprocessing=spec.model_dump_json(),
        cuts=cut,
        kind=captured.kind,
    )
    bottleneck = BottleneckRun(run, halves, plan_of(halves, train), partial(draw, images_N3HW=train.images_N3HW), spec)
    module = bottleneck.train()
    module, tables = bottleneck.load()
    split = answer_export.SplitNetwork(
        captured.whole, halves.trunk, module.encoder, FromLatent(module.decoder, module.heads), tables
    )
    what = f"{len(train)} images of the user's, unlabelled; figures of {len(held_out)} others; cut after {cut}"
    training = {"command": command, "seed": run.seed, "seconds": run.seconds(), "data": what}
    return answer_export.write(folder, split, task, spec, {**about, "training": training}, MAX_BYTES, held_out)


def halves_of(captured: Captured, cut: str) -> Halves:
    """The network before and after a cut."""
    trunk, rest = blocks(captured, (cut,))
    (channels,) = (each.shape[0] for each in captured.cuts if each.name == cut)
    return Halves(captured.kind, trunk.eval(), rest.eval(), channels)


def plan_of(halves: Halves, part: Images) -> Plan:
    """Sizes and prices by the map and the images."""
    kilobyte_budget = JPEG_SHARE * own_data.jpeg_bytes(part.images_N3HW[:JPEG_IMAGES]) / 1024
    epochs = min(max(round(STEPS / max(min(len(part), EPOCH_IMAGES) // BATCH, 1)), LEAST_EPOCHS), MOST_EPOCHS)
    return Plan(
        latent=min(LATENT, halves.channels),
        decoder=DECODER,
        per_kilobyte=tuple(price / kilobyte_budget for price in PRICES),
        log_gains=LOG_GAINS,
        epochs=epochs,
        ramp_epochs=max(round(RAMP_SHARE * epochs), 1),
    )


def draw(folder: Path, images_N3HW: NDArray[np.uint8]) -> Views:
    """Images as they are and mirrored."""
    some_N3HW: Sequence[NDArray[np.uint8]] = list(images_N3HW[:EPOCH_IMAGES])

    def rows() -> Iterator[NDArray[np.uint8]]:
        for image_3HW in some_N3HW:
            yield np.stack([image_3HW, image_3HW[:, :, ::-1]])

    return draw_views(folder, len(some_N3HW), images_N3HW.shape[1:], rows(), VIEWS)
