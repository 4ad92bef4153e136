"""A trained split classifier -> a bundle: weights, ONNX head, integer tables, and what it scores as it will run.

Everything measured here runs the shipped parts: ONNX Runtime's head, the entropy coder's real bytes, the loaded tail.
"""

from __future__ import annotations

import itertools
import os
import platform
import tempfile
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from rich.progress import track
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from isthmus.models.bundle.files import write_bundle
from isthmus.models.bundle.manifest import Interval
from isthmus.models.codecs import checkerboard as contextual
from isthmus.models.codecs.checkerboard import Tables
from isthmus.models.recipes.common.calibrate import certify, interval
from isthmus.models.recipes.vision.graphs import compact, onnx_bytes
from isthmus.models.recipes.vision.int8 import quantise_head
from isthmus.models.recipes.vision.slim_onnx import slim_onnx
from isthmus.models.vision.bundle import Bundle
from isthmus.models.vision.catalog import BUILDERS
from isthmus.models.vision.head import Head
from isthmus.models.vision.manifest import Architecture, Manifest, Precision, Preprocessing, Task
from isthmus.models.vision.slim import SlimEncoder
from isthmus.models.vision.split import SplitClassifier, Tap
from isthmus.models.vision.tail import in_channels, open_tail

LEAST_SCALE = 1e-12  # of a channel of zeros
VERSIONS = ("torch", "compressai", "constriction", "onnxruntime", "numpy")
UNITS = {
    "accuracy, agreement, coverage, loss": "fraction",
    "macs": "multiply-accumulate operations an input",
    "mean_bytes, max_bytes": "entropy-coded bytes an input, without framing",
    "seconds": "s",
    "shapes": "channels, height, width",
}

Floats = NDArray[np.float32]
Shape = tuple[int, int, int]


@dataclass(frozen=True)
class TrainedTap:
    """The integer tables of one tap, and what a payload of it may cost at most."""

    name: str
    tables: Tables
    max_payload_bytes: int


@dataclass(frozen=True)
class Trained:
    """What a recipe hands over. `ranges`: preprocessed training images that an int8 head's scales are found on."""

    split: SplitClassifier
    taps: tuple[TrainedTap, ...]
    tasks: tuple[Task, ...]
    architecture: Architecture
    preprocessing: Preprocessing
    ranges: Sequence[Floats]


@dataclass(frozen=True)
class Samples:
    """Preprocessed images (3, H, W) and their classes in each task."""

    images: Sequence[Floats]
    labels_TN: Sequence[NDArray[np.int64]]


@dataclass(frozen=True)
class MeasuredTap:
    """Probabilities of the first task and payload sizes at every width and rate; other tasks at the best of both."""

    first_WRNK: Floats
    bytes_WRN: NDArray[np.int64]
    others_TNK: Sequence[Floats]


@dataclass(frozen=True)
class Measured:
    """Probabilities of every way an input can be answered: E exits, the taps, the unsplit cloud model for each task."""

    exits: Mapping[Precision, Floats]  # ENK
    taps: Sequence[MeasuredTap]
    cloud_TNK: Sequence[Floats]


class WithExit(nn.Module):
    """One segment as ONNX sees it: features and exit logits at once."""

    def __init__(self, blocks: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.blocks, self.head = blocks, head

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features_BCHW = self.blocks(x)
        return features_BCHW, self.head(features_BCHW)


@torch.no_grad()
def halve(module: nn.Module, coarse: Container[str] = ()) -> dict[str, Tensor]:
    """Round matrices to float16, in place, and return what is stored: vectors stay float32, they are few.

    Those named in `coarse` are rounded to 8 bits, with a scale of each output channel.
    """
    stored: dict[str, Tensor] = {}
    for name, tensor in module.state_dict().items():
        if tensor.ndim >= 2 and name in coarse:
            scale_O = tensor.abs().flatten(1).amax(1).clamp(min=LEAST_SCALE) / 127
            codes = torch.round(tensor / in_channels(scale_O, tensor.ndim)).to(torch.int8)
            stored |= {name: codes.contiguous(), f"{name}.scale": scale_O}
            tensor.copy_(codes.float() * in_channels(scale_O, tensor.ndim))
            continue
        if tensor.ndim >= 2:
            tensor.copy_(tensor.half().float())
        stored[name] = (tensor.half() if tensor.ndim >= 2 else tensor).contiguous().clone()
    return stored


def in_cloud(split: SplitClassifier, architecture: Architecture) -> set[str]:
    """Names of what only the cloud runs: behind the last cut, and a tap's own half. Exits may be made of the former."""
    cut = 1 << 30 if architecture.exit_blocks else architecture.cuts[-1]
    found = set()
    for name in split.state_dict():
        parts = name.split(".")
        if parts[:2] == ["backbone", "blocks"] and int(parts[2]) >= cut:
            found.add(name)
        if parts[0] == "taps" and parts[2] in ("tail", "between", "decoder"):
            found.add(name)
    return found


class FromLatent(nn.Module):
    """What the cloud makes of a tap's latent, first task."""

    def __init__(self, split: SplitClassifier, tap: int) -> None:
        super().__init__()
        self.split, self.tap = split, tap

    def forward(self, latent: Tensor, rate: Tensor) -> Tensor:
        return self.split.answer(self.split.decode(self.tap, latent, rate), 0, self.tap)


def macs(module: nn.Module, *inputs: Tensor | int) -> int:
    """Multiply-accumulate operations of one call."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(*inputs)
    return int(counter.get_total_flops()) // 2


@dataclass(frozen=True)
class Parts:
    """Manifest entries of segments and taps, the graphs of the segments at each precision, and all files."""

    segments: list[dict[str, Any]]
    taps: list[dict[str, Any]]
    heads: dict[Precision, list[str]]
    files: dict[str, bytes]


def head_parts(trained: Trained) -> Parts:
    """What the device runs."""
    split, segments = trained.split, []
    graphs: list[bytes] = []
    shapes: list[Shape] = [(3, *trained.preprocessing.crop)]
    starts = (0, *trained.architecture.cuts)
    for index, (start, stop) in enumerate(itertools.pairwise(starts)):
        x_BCHW = torch.zeros(1, *shapes[-1])
        part = WithExit(split.backbone.section(start, stop), split.exit(index))
        graphs.append(onnx_bytes(part, {"x": x_BCHW}, outputs=2))
        with torch.no_grad():
            y_BCHW = split.segment(index, x_BCHW)
        shapes.append(chw(y_BCHW))
        segments.append({"input": shapes[-2], "output": shapes[-1], "macs": macs(part, x_BCHW)})
    heads: dict[Precision, list[str]] = {}
    files: dict[str, bytes] = {}
    at_precision: dict[Precision, list[bytes]] = {"fp32": graphs, "int8": quantise_head(graphs, trained.ranges)}
    for precision, own_graphs in at_precision.items():
        named = {f"head{index}.{precision}.onnx": compact(graph) for index, graph in enumerate(own_graphs)}
        heads[precision] = list(named)
        files |= named
    taps = []
    for index, (described, built) in enumerate(zip(trained.taps, trained.architecture.taps, strict=True)):
        entry, own_files = tap_parts(split, split.tap(index), described, shapes[built.after])
        taps.append(entry)
        files |= own_files
    return Parts(segments, taps, heads, files)


def cloud_parts(trained: Trained) -> tuple[dict[str, Any], dict[str, bytes]]:
    """What the manifest says of the cloud's half, and its files: weights, or graphs for what no builder builds."""
    split = trained.split
    if trained.architecture.builder in BUILDERS:
        stored = halve(split, in_cloud(split, trained.architecture))
        return {"weights": "weights.safetensors"}, {"weights.safetensors": safetensors.torch.save(stored)}
    images_B3HW = torch.zeros(2, 3, *trained.preprocessing.crop)
    halve(nn.ModuleList([split.taps, split.exits]))  # what was trained here; the backbone is its owner's
    files = {"image.onnx": compact(onnx_bytes(split.backbone, {"x": images_B3HW}, outputs=1))}
    with torch.no_grad():
        features_BCHW = split.trunk(images_B3HW)
        for index, described in enumerate(trained.taps):
            inputs = {"latent": split.tap(index).encoder(features_BCHW), "rate": torch.zeros(2, dtype=torch.long)}
            files[f"{described.name}_tail.onnx"] = compact(onnx_bytes(FromLatent(split, index), inputs, outputs=1))
    image, *taps = files
    return {"graphs": {"image": image, "taps": taps}}, files


def tap_parts(
    split: SplitClassifier, tap: Tap, described: TrainedTap, input_CHW: Shape
) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Manifest entry of a tap without its measured rates, and its two files."""
    x_BCHW, rate_B = torch.zeros(1, *input_CHW), torch.zeros(1, dtype=torch.long)
    with torch.no_grad():
        latent_BCHW = tap.encoder(x_BCHW)
        decoded_BCHW = tap.decoder(latent_BCHW, rate_B)
    latent_CHW = chw(latent_BCHW)
    if isinstance(tap.encoder, SlimEncoder):
        graph = slim_onnx(tap.encoder, input_CHW, latent_CHW)
        costs = [(width, macs(tap.encoder, x_BCHW, index)) for index, width in enumerate(tap.encoder.widths)]
    else:
        graph = onnx_bytes(tap.encoder, {"x": x_BCHW}, outputs=1)
        costs = [(1.0, macs(tap.encoder, x_BCHW))]
    rest = split.backbone.section(tap.rejoin)
    files = (f"{described.name}.onnx", f"{described.name}.safetensors")
    entry: dict[str, Any] = {
        "name": described.name,
        "encoder": files[0],
        "tables": files[1],
        "latent": latent_CHW,
        "tail_macs": macs(tap.decoder, latent_BCHW, rate_B) + macs(rest, decoded_BCHW),
        "max_payload_bytes": described.max_payload_bytes,
        "widths": [{"width": width, "encoder_macs": cost} for width, cost in costs],
    }
    tables = {key: torch.from_numpy(value) for key, value in contextual.to_tensors(described.tables).items()}
    return entry, {files[0]: graph, files[1]: safetensors.torch.save(tables)}


def chw(features_BCHW: Tensor) -> Shape:
    """Channels, height, width."""
    _, channels, height, width = features_BCHW.shape
    return channels, height, width


def measure(opened: Bundle, samples: Samples, title: str) -> Measured:
    """Answer every sample every way: exits; taps, widths and rates through real bytes; the unsplit cloud model."""
    tail, manifest = open_tail(opened), opened.manifest
    heads = {precision: Head(opened, precision=precision) for precision in manifest.heads}
    tasks = range(len(manifest.tasks))
    codecs = [opened.codec(tap) for tap in range(len(manifest.taps))]
    exits: dict[Precision, list[list[Floats]]] = {precision: [] for precision in heads}
    cloud = []
    taps: list[list[tuple[Any, Any, Any]]] = [[] for _ in codecs]
    for image_CHW in track(samples.images, title, disable=not os.isatty(1)):
        features: list[Floats] = []
        for precision, head in heads.items():
            inputs, answers = [image_CHW], []
            for index in range(head.exits):
                features_CHW, probabilities_K = head.segment(index, inputs[-1])
                inputs.append(features_CHW)
                answers.append(probabilities_K)
            exits[precision].append(answers)
            if precision == "fp32":
                features = inputs
        cloud.append([rows[0] for rows in tail.images_to_tasks([image_CHW], tasks)])
        for tap, codec in enumerate(codecs):
            architecture = manifest.architecture.taps[tap]
            first, sizes, latents = [], [], []
            for width in range(len(architecture.widths)):
                latent_CHW = heads["fp32"].encode(tap, features[architecture.after], width)
                sent = [codec.compress(latent_CHW, rate) for rate in range(architecture.rates)]
                latents = [codec.dequantise(codec.decode(data, rate), rate) for rate, data in sent]
                first.append(tail.answer_latents(tap, latents, [rate for rate, _ in sent]))
                sizes.append([len(data) for _, data in sent])
            others = tail.latents_to_tasks(tap, latents[-1:], [sent[-1][0]], tasks[1:])
            taps[tap].append((first, sizes, [rows[0] for rows in others]))
    return Measured(
        exits={precision: np.array(rows).transpose(1, 0, 2) for precision, rows in exits.items()},
        taps=[
            MeasuredTap(
                first_WRNK=np.array([first for first, _, _ in rows]).transpose(1, 2, 0, 3),
                bytes_WRN=np.array([sizes for _, sizes, _ in rows]).transpose(1, 2, 0),
                others_TNK=[np.array(task) for task in zip(*(others for _, _, others in rows), strict=True)],
            )
            for rows in taps
        ],
        cloud_TNK=[np.array(task) for task in zip(*cloud, strict=True)],
    )


def calibrated(measured: Measured, labels_N: NDArray[np.int64]) -> dict[str, Any]:
    """What the calibration part decides for the first task: exits and thresholds of each head, rates of each tap."""
    cloud_N = measured.cloud_TNK[0].argmax(1)
    heads: dict[Precision, dict[str, Any]] = {}
    for precision, exits_ENK in measured.exits.items():
        answers_EN = exits_ENK.argmax(2)
        exits = [
            {"name": f"exit{index}", "accuracy": mean(answer_N == labels_N), "agreement": mean(answer_N == cloud_N)}
            for index, answer_N in enumerate(answers_EN)
        ]
        thresholds = certify(exits_ENK.max(2), answers_EN == labels_N, cloud_N == labels_N)
        heads[precision] = {"exits": exits, "thresholds": [threshold.model_dump() for threshold in thresholds]}
    rates = [
        [
            [
                {
                    "mean_bytes": float(sizes_N.mean()),
                    "max_bytes": int(sizes_N.max()),
                    "accuracy": mean(answer_N == labels_N),
                    "agreement": mean(answer_N == cloud_N),
                }
                for sizes_N, answer_N in zip(sizes_RN, first_RNK.argmax(2), strict=True)
            ]
            for sizes_RN, first_RNK in zip(tap.bytes_WRN, tap.first_WRNK, strict=True)
        ]
        for tap in measured.taps
    ]
    return {"heads": heads, "rates": rates}


def final_scores(measured: Measured, trained: Trained, labels_TN: Sequence[NDArray[np.int64]]) -> dict[str, Interval]:
    """Scores on the test part, with intervals."""
    labels_N, cloud_N = labels_TN[0], measured.cloud_TNK[0].argmax(1)
    scores = {"test cloud accuracy": interval(cloud_N == labels_N)}
    for precision, exits_ENK in measured.exits.items():
        for index, answer_N in enumerate(exits_ENK.argmax(2)):
            scores[f"test {precision} exit{index} accuracy"] = interval(answer_N == labels_N)
            scores[f"test {precision} exit{index} agreement"] = interval(answer_N == cloud_N)
    for tap, described, built in zip(measured.taps, trained.taps, trained.architecture.taps, strict=True):
        for width, first_RNK in zip(built.widths, tap.first_WRNK, strict=True):
            for rate, answer_N in enumerate(first_RNK.argmax(2)):
                name = f"test {described.name} {width:g} rate{rate}"
                scores[f"{name} accuracy"] = interval(answer_N == labels_N)
                scores[f"{name} agreement"] = interval(answer_N == cloud_N)
        for task, others_NK, right_N in zip(trained.tasks[1:], tap.others_TNK, labels_TN[1:], strict=True):
            scores[f"test {described.name} {task.name} accuracy"] = interval(others_NK.argmax(1) == right_N)
    for task, cloud_NK, right_N in zip(trained.tasks[1:], measured.cloud_TNK[1:], labels_TN[1:], strict=True):
        scores[f"test cloud {task.name} accuracy"] = interval(cloud_NK.argmax(1) == right_N)
    return scores


def mean(right_N: NDArray[np.bool_]) -> float:
    return float(right_N.mean())


def write(
    folder: Path, trained: Trained, about: dict[str, Any], training: dict[str, Any], calibration: Samples, test: Samples
) -> Bundle:
    """Write the bundle: first a draft with neutral figures, then, measured as it runs, the final one.

    `about` has name and licence; `training` command, seed, seconds and data.
    """
    trained.split.eval()
    cloud, cloud_files = cloud_parts(trained)
    parts = head_parts(trained)
    files = {**parts.files, **cloud_files}
    manifest: dict[str, Any] = {
        **about,
        "tasks": [task.model_dump(mode="json") for task in trained.tasks],
        "preprocessing": trained.preprocessing.model_dump(mode="json"),
        "architecture": trained.architecture.model_dump(mode="json", exclude_none=True),
        **cloud,
        "segments": parts.segments,
        "tail_macs": macs(
            trained.split.backbone.section(trained.split.cuts[-1]), torch.zeros(1, *parts.segments[-1]["output"])
        ),
        "training": {
            **training,
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "versions": {name: version(name) for name in VERSIONS},
        },
        "units": UNITS,
    }
    blank = {"mean_bytes": 0.0, "max_bytes": 0, "accuracy": 0.0, "agreement": 0.0}
    no_exits = [{"name": f"exit{i}", "accuracy": 0.0, "agreement": 0.0} for i in range(len(parts.segments))]
    draft = {
        **manifest,
        "heads": {name: {"files": own, "exits": no_exits, "thresholds": []} for name, own in parts.heads.items()},
        "taps": with_rates(parts.taps, [[[blank] * tap.rates] * len(tap.widths) for tap in trained.architecture.taps]),
        "scores": {},
    }
    with tempfile.TemporaryDirectory() as scratch:
        opened = Bundle.open(write_bundle(Path(scratch) / "draft", draft, files, Manifest))
        decided = calibrated(measure(opened, calibration, "calibration"), calibration.labels_TN[0])
        scores = final_scores(measure(opened, test, "test"), trained, test.labels_TN)
    final = {
        **manifest,
        "heads": {name: {"files": own, **decided["heads"][name]} for name, own in parts.heads.items()},
        "taps": with_rates(parts.taps, decided["rates"]),
        "scores": {name: score.model_dump() for name, score in scores.items()},
    }
    return Bundle.open(write_bundle(folder, final, files, Manifest))


def with_rates(taps: list[dict[str, Any]], rates: list[list[list[dict[str, Any]]]]) -> list[dict[str, Any]]:
    """Tap entries with the figures of every width and rate put in."""
    return [
        {**tap, "widths": [{**width, "rates": own} for width, own in zip(tap["widths"], each, strict=True)]}
        for tap, each in zip(taps, rates, strict=True)
    ]
