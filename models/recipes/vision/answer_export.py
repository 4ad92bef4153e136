"""A network of any kind with a bottleneck -> a bundle of graphs, measured as it runs: agreement in place of accuracy.

The reference of every way is what the whole network serves for the photo as it is: of boxes the mean average precision
at an overlap of one half, of maps the mean intersection over union, of vectors the mean cosine (`agreement`).
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from rich.progress import track
from safetensors.numpy import save
from torch import nn

from isthmus.models.bundle.files import write_bundle
from isthmus.models.codecs import checkerboard
from isthmus.models.codecs.checkerboard import Tables
from isthmus.models.recipes.common.environment import environment
from isthmus.models.recipes.vision.agreement import UNIT, Answer, agreement
from isthmus.models.recipes.vision.answer_distil import FromLatent, MapEncoder
from isthmus.models.recipes.vision.export import UNITS, VERSIONS, placeholders, with_figures
from isthmus.models.recipes.vision.graphs import compact, onnx_bytes
from isthmus.models.recipes.vision.measure import IMAGE_WAYS
from isthmus.models.recipes.vision.parts import chw, halve, macs
from isthmus.models.vision.architecture import Architecture, TapArchitecture
from isthmus.models.vision.bundle import Bundle
from isthmus.models.vision.certificates import dependencies
from isthmus.models.vision.head import Head
from isthmus.models.vision.images import encode_whole, open_image, preprocess
from isthmus.models.vision.manifest import NEVER, Manifest, Preprocessing
from isthmus.models.vision.outputs import Raw, finish, graph_outputs
from isthmus.models.vision.tail import open_tail
from isthmus.models.vision.tasks import AnyTask

EPSILON, DELTA = 0.005, 0.1  # of the certificate that no exit answers: there is none


@dataclass(frozen=True)
class SplitNetwork:
    """The parts of a network: whole, before its bottleneck, its encoder, after its decoder; and its tables."""

    whole: nn.Module
    trunk: nn.Module
    encoder: MapEncoder
    rest: FromLatent
    tables: Tables


def write(
    folder: Path,
    split: SplitNetwork,
    task: AnyTask,
    spec: Preprocessing,
    about: dict[str, Any],
    max_bytes: int,
    photos: Sequence[Path],
) -> Bundle:
    """A bundle with figures of `photos`, which did not train it. `about` has name, licence and training."""
    halve(nn.ModuleList([split.encoder, split.rest.decoder]))
    files = graphs(split, task, spec)
    arrays = checkerboard.to_tensors(split.tables)
    files["bottleneck.safetensors"] = save(arrays)
    manifest = entries(split, task, spec, max_bytes) | about
    manifest["training"] = {**about["training"], **environment(VERSIONS)}
    draft = with_figures(manifest, placeholders(manifest))
    with tempfile.TemporaryDirectory() as scratch:
        draft["heads"]["fp32"]["exits"][0]["answers"] = False
        opened = Bundle.open(write_bundle(Path(scratch) / "draft", draft, files, Manifest))
        found = measured(opened, photos)
    found["heads"]["fp32"]["depends_on"] = dependencies(opened.manifest, "fp32").model_dump()
    return Bundle.open(write_bundle(folder, with_figures(manifest, found), files, Manifest))


def graphs(split: SplitNetwork, task: AnyTask, spec: Preprocessing) -> dict[str, bytes]:
    """The graphs of both ends by their files' names."""
    names = [f"{task.name}.{name}" for name in graph_outputs(task, None)]
    image_13HW, images_23HW = (torch.zeros(batch, 3, *spec.crop) for batch in (1, 2))
    with torch.no_grad():
        packed_2CHW = split.trunk(images_23HW)
        inputs = {"latent": split.encoder(packed_2CHW), "rate": torch.zeros(2, dtype=torch.long)}
    return {
        "image.onnx": compact(onnx_bytes(split.whole, {"x": images_23HW}, names)),
        "bottleneck_tail.onnx": compact(onnx_bytes(split.rest, inputs, names)),
        "head0.fp32.onnx": compact(onnx_bytes(split.trunk, {"x": image_13HW}, 1)),
        "bottleneck.onnx": compact(onnx_bytes(split.encoder, {"x": packed_2CHW[:1]}, 1)),
    }


def entries(split: SplitNetwork, task: AnyTask, spec: Preprocessing, max_bytes: int) -> dict[str, Any]:
    """Manifest entries that are known before anything is measured."""
    image_13HW, rate_1 = torch.zeros(1, 3, *spec.crop), torch.zeros(1, dtype=torch.long)
    with torch.no_grad():
        packed_1CHW = split.trunk(image_13HW)
        latent_1CHW = split.encoder(packed_1CHW)
    tap = TapArchitecture(
        after=1,
        rejoin=1,
        own_tail=True,
        latent_channels=latent_1CHW.shape[1],
        decoder_channels=split.rest.decoder.expand.out_channels,
        rates=len(split.tables.gain_RC),
    )
    built = Architecture(builder="graphs", backbone="own", classes=(task.channels,), cuts=(1,), taps=(tap,))
    head_macs = macs(split.trunk, image_13HW)
    return {
        "tasks": [task.model_dump(mode="json")],
        "preprocessing": spec.model_dump(mode="json"),
        "architecture": built.model_dump(mode="json", exclude_none=True),
        "graphs": {"image": "image.onnx", "taps": ["bottleneck_tail.onnx"]},
        "segments": [{"input": (3, *spec.crop), "output": chw(packed_1CHW), "macs": head_macs}],
        "heads": {"fp32": {"files": ["head0.fp32.onnx"]}},
        "taps": [
            {
                "name": "bottleneck",
                "encoder": "bottleneck.onnx",
                "tables": "bottleneck.safetensors",
                "latent": chw(latent_1CHW),
                "tail_macs": macs(split.rest, latent_1CHW, rate_1),
                "max_payload_bytes": max_bytes,
                "widths": [{"width": 1.0, "encoder_macs": macs(split.encoder, packed_1CHW)}],
            }
        ],
        "tail_macs": macs(split.whole, image_13HW) - head_macs,
        "units": {
            **UNITS,
            "accuracy, agreement": UNIT[task.kind],
        },
    }


class Measuring:
    """The shipped parts of a bundle, opened to answer one photo after the other."""

    def __init__(self, opened: Bundle) -> None:
        (self._task,) = opened.manifest.tasks
        self._spec = opened.manifest.preprocessing
        self._rates = opened.manifest.architecture.taps[0].rates
        self._head, self._tail, self._codec = Head(opened), open_tail(opened), opened.codec(0)

    def photo(self, photo: Image.Image) -> tuple[Answer, list[tuple[Answer, int]], list[tuple[Answer, int]]]:
        """The reference, and each rate's and each whole image's answer and bytes."""
        image_CHW = preprocess(photo, self._spec)
        features_CHW, _ = self._head.segment(0, image_CHW)
        latent_CHW = self._head.encode(0, features_CHW, 0)
        sent = []
        for chosen in range(self._rates):
            rate, payload = self._codec.compress(latent_CHW, chosen)
            decoded_CHW = self._codec.dequantise(self._codec.decode(payload, rate), rate)
            sent.append((self._answer(self._tail.latents_to_tasks(0, [decoded_CHW], [rate], (0,))[0]), len(payload)))
        whole = []
        for form, quality in IMAGE_WAYS:
            file = encode_whole(photo, self._spec.resize, form, quality, self._spec.fit)
            whole.append((self._whole(preprocess(open_image(file), self._spec)), len(file)))
        return self._whole(image_CHW), sent, whole

    def _whole(self, image_CHW: NDArray[np.float32]) -> Answer:
        return self._answer(self._tail.images_to_tasks([image_CHW], (0,))[0])

    def _answer(self, answer: NDArray[np.float32] | Raw) -> Answer:
        assert not isinstance(answer, np.ndarray)
        return finish(self._task, {name: batch[0] for name, batch in answer.items()}, self._spec.crop)


def measured(opened: Bundle, photos: Sequence[Path]) -> dict[str, Any]:
    """Figures of every way on photos: bytes, and agreement, also in place of accuracy."""
    measuring, (task,) = Measuring(opened), opened.manifest.tasks
    references, rates, images = [], [], []
    for path in track(photos, "measuring"):
        reference, sent, whole = measuring.photo(open_image(path.read_bytes()))
        references.append(reference)
        rates.append(sent)
        images.append(whole)
    never = {"promise": "agreement", "among": "all", "epsilon": EPSILON, "delta": DELTA, "samples": len(photos)}
    never |= {"confidences": [NEVER], "shares": [0.0], "accuracy": 0.0, "agreement": 0.0, "loss": 0.0}
    exit_ = {"name": "exit0", "accuracy": 0.0, "agreement": 0.0, "answers": False}
    return {
        "heads": {"fp32": {"exits": [exit_], "thresholds": [never]}},
        "rates": [[[figures(task, references, way, most=True) for way in zip(*rates, strict=True)]]],
        "images": [
            {"form": form, "quality": quality, **figures(task, references, way)}
            for (form, quality), way in zip(IMAGE_WAYS, zip(*images, strict=True), strict=True)
        ],
        "calibration_samples": len(photos),
        "scores": {},
    }


def figures(
    task: AnyTask, references: Sequence[Answer], way: Sequence[tuple[Answer, int]], *, most: bool = False
) -> dict[str, Any]:
    """Of one way over all photos."""
    sizes = [size for _, size in way]
    same = agreement(task, references, [answer for answer, _ in way])
    found = {"mean_bytes": float(np.mean(sizes)), "accuracy": same, "agreement": same}
    return found | ({"max_bytes": max(sizes)} if most else {})
