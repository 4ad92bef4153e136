"""A trained split classifier -> a bundle: weights, ONNX head, integer tables, and what it scores as it will run.

Everything measured here runs the shipped parts: ONNX Runtime's head, the entropy coder's real bytes, the loaded tail.
"""

from __future__ import annotations

import io
import itertools
import os
import platform
import tempfile
import warnings
from collections.abc import Sequence
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

from models import bundle as bundles
from models.bundle import Bundle
from models.codecs import factorized
from models.codecs.factorized import RateTables
from models.manifest import Architecture, Interval, Preprocessing
from models.recipes.calibrate import certify, interval
from models.vision.head import Head
from models.vision.split import SplitClassifier
from models.vision.tail import Tail

VERSIONS = ("torch", "compressai", "constriction", "onnxruntime", "numpy")
UNITS = {
    "accuracy, agreement, coverage, loss": "fraction",
    "macs": "multiply-accumulate operations an input",
    "mean_bytes, max_bytes": "entropy-coded bytes an input, without framing",
    "seconds": "s",
    "shapes": "channels, height, width",
}

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Trained:
    """What a recipe hands over."""

    split: SplitClassifier
    tables: tuple[RateTables, ...]
    architecture: Architecture
    preprocessing: Preprocessing
    max_payload_bytes: int


@dataclass(frozen=True)
class Samples:
    """Preprocessed images (3, H, W) and their labels."""

    images: Sequence[Floats]
    labels_N: NDArray[np.int64]


@dataclass(frozen=True)
class Measured:
    """Probabilities of every way an input can be answered: E exits, R rates."""

    exits_ENK: Floats
    rates_RNK: Floats
    cloud_NK: Floats
    bytes_RN: NDArray[np.int64]


class WithExit(nn.Module):
    """One segment as ONNX sees it: features and exit logits at once."""

    def __init__(self, blocks: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.blocks, self.head = blocks, head

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features_BCHW = self.blocks(x)
        return features_BCHW, self.head(features_BCHW)


@torch.no_grad()
def halve_weights(split: SplitClassifier) -> dict[str, Tensor]:
    """Round matrices to float16, in place, and return what is stored: vectors stay float32, they are few."""
    stored = {}
    for name, tensor in split.state_dict().items():
        if tensor.ndim >= 2:
            tensor.copy_(tensor.half().float())
        stored[name] = (tensor.half() if tensor.ndim >= 2 else tensor).contiguous().clone()
    return stored


def onnx_bytes(module: nn.Module, shape_CHW: tuple[int, ...], outputs: int) -> bytes:
    """A module as an ONNX graph with input `x` of batch 1 and static shape."""
    buffer = io.BytesIO()
    names = [f"y{index}" for index in range(outputs)]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own: shapes are static here, and it says that it is old
        torch.onnx.export(
            module.eval(),
            (torch.zeros(1, *shape_CHW),),
            buffer,  # type: ignore[arg-type]  # the exporter in use (dynamo=False) writes to open files too
            input_names=["x"],
            output_names=names,
            dynamo=False,
        )
    return buffer.getvalue()


def macs(module: nn.Module, *inputs: Tensor) -> int:
    """Multiply-accumulate operations of one call."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(*inputs)
    return int(counter.get_total_flops()) // 2


def head_parts(trained: Trained) -> tuple[list[dict[str, Any]], dict[str, Any], dict[str, bytes]]:
    """Manifest entries of segments and bottleneck, and the files they name."""
    split, files, segments = trained.split, {}, []
    x_BCHW = torch.zeros(1, 3, *trained.preprocessing.crop)
    starts = (0, *trained.architecture.cuts)
    for index, (start, stop) in enumerate(itertools.pairwise(starts)):
        part = WithExit(split.backbone.blocks[start:stop], split.exits[index])
        name = f"head{index}.onnx"
        files[name] = onnx_bytes(part, x_BCHW.shape[1:], outputs=2)
        cost = macs(part, x_BCHW)
        with torch.no_grad():
            y_BCHW = split.segment(index, x_BCHW)
        segments.append({"file": name, "input": list(x_BCHW.shape[1:]), "output": list(y_BCHW.shape[1:]), "macs": cost})
        x_BCHW = y_BCHW
    files["encoder.onnx"] = onnx_bytes(split.encoder, x_BCHW.shape[1:], outputs=1)
    tables = {key: torch.from_numpy(value) for key, value in factorized.to_tensors(trained.tables).items()}
    files["tables.safetensors"] = safetensors.torch.save(tables)
    bottleneck = {
        "encoder": "encoder.onnx",
        "tables": "tables.safetensors",
        "latent": [trained.architecture.latent_channels, *x_BCHW.shape[2:]],
        "encoder_macs": macs(split.encoder, x_BCHW),
        "max_payload_bytes": trained.max_payload_bytes,
    }
    return segments, bottleneck, files


def tail_macs(trained: Trained, latent_CHW: Sequence[int]) -> int:
    """Cost of decoder and tail for one input."""
    split = trained.split
    latent_BCHW, rate_B = torch.zeros(1, *latent_CHW), torch.zeros(1, dtype=torch.long)
    with torch.no_grad():
        features_BCHW = split.decoder(latent_BCHW, rate_B)
    return macs(split.decoder, latent_BCHW, rate_B) + macs(split.backbone.blocks[split.cuts[-1] :], features_BCHW)


def measure(opened: Bundle, samples: Samples, title: str) -> Measured:
    """Answer every sample every way: each exit, each rate through real bytes, the unsplit cloud model."""
    head, tail, codec = Head(opened), Tail(opened), opened.codec()
    exits, rates, cloud, sizes = [], [], [], []
    for image_CHW in track(samples.images, title, disable=not os.isatty(1)):
        features_CHW, exit_rows = image_CHW, []
        for index in range(head.exits):
            features_CHW, probabilities_K = head.segment(index, features_CHW)
            exit_rows.append(probabilities_K)
        latent_CHW = head.encode(features_CHW)
        payloads = [codec.encode(codec.quantise(latent_CHW, r), r) for r in range(len(codec.rates))]
        latents = [codec.dequantise(codec.decode(data, r), r) for r, data in enumerate(payloads)]
        exits.append(exit_rows)
        sizes.append([len(data) for data in payloads])
        rates.append(tail.answer_latents(latents, range(len(latents))))
        cloud.append(tail.answer_images([image_CHW])[0])
    return Measured(
        exits_ENK=np.array(exits).transpose(1, 0, 2),
        rates_RNK=np.array(rates).transpose(1, 0, 2),
        cloud_NK=np.array(cloud),
        bytes_RN=np.array(sizes).T,
    )


def calibrated(measured: Measured, labels_N: NDArray[np.int64], cuts: Sequence[int]) -> dict[str, Any]:
    """Manifest entries that the calibration part decides: exits, rates, thresholds."""
    cloud_N = measured.cloud_NK.argmax(1)
    exits = [
        {"name": f"exit{index}", "accuracy": mean(answer_N == labels_N), "agreement": mean(answer_N == cloud_N)}
        for index, answer_N in zip(range(len(cuts)), measured.exits_ENK.argmax(2), strict=True)
    ]
    rates = [
        {
            "mean_bytes": float(sizes_N.mean()),
            "max_bytes": int(sizes_N.max()),
            "accuracy": mean(answer_N == labels_N),
            "agreement": mean(answer_N == cloud_N),
        }
        for sizes_N, answer_N in zip(measured.bytes_RN, measured.rates_RNK.argmax(2), strict=True)
    ]
    thresholds = certify(measured.exits_ENK.max(2), measured.exits_ENK.argmax(2) == labels_N, cloud_N == labels_N)
    return {"exits": exits, "rates": rates, "thresholds": [t.model_dump() for t in thresholds]}


def final_scores(measured: Measured, labels_N: NDArray[np.int64]) -> dict[str, Interval]:
    """Scores on the test part, with intervals."""
    cloud_N = measured.cloud_NK.argmax(1)
    scores = {"test cloud accuracy": interval(cloud_N == labels_N)}
    for index, answer_N in enumerate(measured.exits_ENK.argmax(2)):
        scores[f"test exit{index} accuracy"] = interval(answer_N == labels_N)
        scores[f"test exit{index} agreement"] = interval(answer_N == cloud_N)
    for index, answer_N in enumerate(measured.rates_RNK.argmax(2)):
        scores[f"test rate{index} accuracy"] = interval(answer_N == labels_N)
        scores[f"test rate{index} agreement"] = interval(answer_N == cloud_N)
    return scores


def mean(right_N: NDArray[np.bool_]) -> float:
    return float(right_N.mean())


def write(
    folder: Path, trained: Trained, about: dict[str, Any], training: dict[str, Any], calibration: Samples, test: Samples
) -> Bundle:
    """Write the bundle: first a draft with neutral figures, then, measured as it runs, the final one.

    `about` has name, labels and licence; `training` command, seed, seconds and data.
    """
    trained.split.eval()
    weights = halve_weights(trained.split)
    segments, bottleneck, files = head_parts(trained)
    files["weights.safetensors"] = safetensors.torch.save(weights)
    exits = [{"name": f"exit{i}", "accuracy": 0.0, "agreement": 0.0} for i in range(len(segments))]
    blank = {"mean_bytes": 0.0, "max_bytes": 0, "accuracy": 0.0, "agreement": 0.0}
    manifest: dict[str, Any] = {
        **about,
        "task": "classification",
        "preprocessing": trained.preprocessing.model_dump(mode="json"),
        "architecture": trained.architecture.model_dump(mode="json"),
        "weights": "weights.safetensors",
        "segments": segments,
        "tail_macs": tail_macs(trained, bottleneck["latent"]),
        "training": {
            **training,
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "versions": {name: version(name) for name in VERSIONS},
        },
        "units": UNITS,
    }
    draft = {
        **manifest,
        "exits": exits,
        "bottleneck": {**bottleneck, "rates": [blank] * len(trained.tables)},
        "thresholds": [],
        "scores": {},
    }
    with tempfile.TemporaryDirectory() as scratch:
        opened = bundles.write(Path(scratch) / "draft", draft, files)
        decided = calibrated(
            measure(opened, calibration, "calibration"), calibration.labels_N, trained.architecture.cuts
        )
        scores = final_scores(measure(opened, test, "test"), test.labels_N)
    final = {
        **manifest,
        "exits": decided["exits"],
        "bottleneck": {**bottleneck, "rates": decided["rates"]},
        "thresholds": decided["thresholds"],
        "scores": {name: score.model_dump() for name, score in scores.items()},
    }
    return bundles.write(folder, final, files)
