"""What every way of a bundle answers to test photos, in how many bytes, and how long its stages take.

    answers    each photo through every exit, tap x width x rate, and whole image -> real bytes, real answers
    stages     the graphs of the device one by one; a real cloud process on loopback, without an emulated link
    Recording  both, as JSON: the simulator replays it, so that it needs neither data nor a cloud
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.progress import track

from isthmus.edge_agent.config import EdgeConfig
from isthmus.edge_agent.policy.exits import OperatingPoint
from isthmus.edge_agent.vision.operating_points import OperatingPoints
from isthmus.edge_agent.vision.replicas import connect
from isthmus.edge_agent.vision.request import InferenceRequest, RequestState
from isthmus.models.messages import Codec, Payload
from isthmus.models.recipes.vision.measure import Measurements, Samples, measure
from isthmus.models.vision.bundle import Bundle
from isthmus.models.vision.head import Head
from isthmus.models.vision.images import encode_image, is_grey, open_image, preprocess, shrink
from isthmus.models.vision.tail import open_tail
from tests.bench.processes import CloudProcess
from tests.bench.sc2_photos import Photos

FORMS = ("jpeg 50", "jpeg 75", "jpeg 90", "webp 50", "webp 75", "webp 90", "png")
DEADLINE_S = 30.0
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Sent:
    """One way of sending a photo: bytes of its payload and the index of the cloud's answer, for each photo."""

    bytes_N: NDArray[np.int64]
    answer_N: NDArray[np.int64]


@dataclass(frozen=True)
class Stages:
    """Seconds of each stage, several runs of each. `cloud`: queue and computation, of a whole image and of each tap."""

    decode: list[float]
    segments: list[list[float]]
    encode: list[list[list[float]]]  # of a tap at a width, codec included
    image_encode: dict[str, list[float]]  # by form
    cloud_image: list[float]
    cloud_tap: list[list[float]]
    exchange: list[float]  # of a reply over loopback, less the cloud's own time


@dataclass(frozen=True)
class Recording:
    """`cloud_N`: the cloud model's answer to the photo as it is. `exits_NEK`: class probabilities of each exit."""

    name: str
    fingerprint: str
    precision: str
    machine: str
    labels_N: NDArray[np.int64]
    cloud_N: NDArray[np.int64]
    exits_NEK: Floats
    points: dict[OperatingPoint, Sent]
    images: dict[str, Sent]
    stages: Stages

    def __len__(self) -> int:
        return len(self.labels_N)

    def save(self, path: Path) -> None:
        """Write it as JSON, answers as digits, probabilities with four places."""
        values = {
            **{name: getattr(self, name) for name in ("name", "fingerprint", "precision", "machine")},
            "labels": self.labels_N.tolist(),
            "cloud": self.cloud_N.tolist(),
            "exits": np.round(self.exits_NEK, 4).tolist(),
            "points": {f"{p.tap} {p.width} {p.rate}": dump(sent) for p, sent in self.points.items()},
            "images": {form: dump(sent) for form, sent in self.images.items()},
            "stages": asdict(self.stages),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values, separators=(",", ":")) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Recording:
        """What `save` wrote."""
        values = json.loads(path.read_text(encoding="utf-8"))
        return cls(
            *(values[name] for name in ("name", "fingerprint", "precision", "machine")),
            labels_N=np.array(values["labels"]),
            cloud_N=np.array(values["cloud"]),
            exits_NEK=np.array(values["exits"]),
            points={OperatingPoint(*map(int, key.split())): loaded(sent) for key, sent in values["points"].items()},
            images={form: loaded(sent) for form, sent in values["images"].items()},
            stages=Stages(**values["stages"]),
        )


def dump(sent: Sent) -> dict[str, list[int]]:
    return {"bytes": sent.bytes_N.tolist(), "answer": sent.answer_N.tolist()}


def loaded(values: dict[str, list[int]]) -> Sent:
    return Sent(np.array(values["bytes"]), np.array(values["answer"]))


def encoded(image: Image.Image, form: str, resize: int) -> bytes:
    """A whole image as an agent sends it: no larger than the network's input, with one channel if it is grey."""
    kind, _, quality = form.partition(" ")
    small = shrink(image, resize)
    return encode_image(small.convert("L") if is_grey(small) else small, kind, int(quality or 75))  # type: ignore[arg-type]


def image_ways(bundle: Bundle, images: Sequence[Image.Image]) -> dict[str, Sent]:
    """Bytes and the cloud model's answers of every form of a whole image."""
    tail, spec = open_tail(bundle), bundle.manifest.preprocessing
    sizes, answers = [], []
    for image in track(images, "whole images", console=Console(stderr=True), transient=True):
        sent = [encoded(image, form, spec.resize) for form in FORMS]
        sizes.append([len(data) for data in sent])
        arrived = [preprocess(open_image(data), spec) for data in sent]
        answers.append(tail.answer_images(arrived).argmax(1))
    return {
        form: Sent(np.array(sizes)[:, index], np.array(answers)[:, index]) for index, form in enumerate(FORMS)
    }


def timed(runs: int, work: Callable[[], Any]) -> list[float]:
    """Seconds of each of `runs` runs, after two that do not count."""
    found = []
    for _ in range(runs + 2):
        started_s = time.perf_counter()
        work()
        found.append(round(time.perf_counter() - started_s, 6))
    return found[2:]


def stages(bundle: Bundle, images: Sequence[Image.Image], runs: int) -> Stages:
    """Times of every stage on this machine, the cloud's from a real process on loopback."""
    manifest, head = bundle.manifest, Head(bundle, 1)
    spec, cuts = manifest.preprocessing, [tap.after for tap in manifest.architecture.taps]
    data = encoded(images[0], "png", spec.resize)
    features = [preprocess(images[0], spec)]
    for index in range(head.exits):
        features.append(head.segment(index, features[-1])[0])
    codecs = [bundle.codec(tap) for tap in range(len(cuts))]

    def send(tap: int, width: int, rate: int) -> Payload:
        used, packed = codecs[tap].compress(head.encode(tap, features[cuts[tap]], width), rate)
        return Payload(Codec.BOTTLENECK, tap, used, packed)

    middle = [len(tap.widths[-1].rates) // 2 for tap in manifest.taps]
    payloads = [send(tap, len(manifest.taps[tap].widths) - 1, middle[tap]) for tap in range(len(cuts))]
    payloads.append(Payload(Codec.IMAGE, 0, 0, encoded(images[0], "jpeg 75", spec.resize)))
    cloud, exchange = cloud_stages(bundle, payloads, runs)
    return Stages(
        decode=timed(runs, lambda: preprocess(open_image(data), spec)),
        segments=[timed(runs, partial(head.segment, index, features[index])) for index in range(head.exits)],
        encode=[
            [timed(runs, partial(send, tap, width, middle[tap])) for width in range(len(described.widths))]
            for tap, described in enumerate(manifest.taps)
        ],
        image_encode={form: timed(runs, partial(encoded, images[0], form, spec.resize)) for form in FORMS},
        cloud_image=cloud[-1],
        cloud_tap=cloud[:-1],
        exchange=exchange,
    )


def cloud_stages(bundle: Bundle, payloads: Sequence[Payload], runs: int) -> tuple[list[list[float]], list[float]]:
    """Seconds that a real cloud spends on each payload, and those of an exchange on loopback beyond them."""
    spent: list[list[float]] = [[] for _ in payloads]
    exchange = []
    with CloudProcess(bundle.folder) as cloud:
        config = EdgeConfig(bundle.folder, (cloud.target,), "split", connect_s=20.0)
        replicas = connect(config, bundle.manifest, bundle.fingerprint, lambda: None)
        for turn in range(runs + 2):
            for index, payload in enumerate(payloads):
                state = RequestState(InferenceRequest((0,), (), True, None), DEADLINE_S)
                found = replicas.infer(payload, (0,), state, lambda state=state: state.left_s, 0.1)  # type: ignore[misc]
                cloud_s = found.reply.queue_s + found.reply.compute_s
                if turn >= 2:
                    spent[index].append(round(cloud_s, 6))
                    exchange.append(round(found.elapsed_s - cloud_s, 6))
        replicas.close()
    return spent, exchange


def point_ways(bundle: Bundle, measured: Measurements) -> dict[OperatingPoint, Sent]:
    return {
        point: Sent(
            measured.taps[point.tap].bytes_WRN[point.width, point.rate],
            measured.taps[point.tap].first_WRNK[point.width, point.rate].argmax(1),
        )
        for point in OperatingPoints(bundle.manifest).figures
    }


def record(bundle: Bundle, photos: Photos, count: int, runs: int = 30) -> Recording:
    """Measure all of it on `count` photos, drawn with a fixed seed."""
    chosen = np.random.default_rng(0).permutation(len(photos.labels_N))[:count]
    images, labels_N = [photos.image(int(index)) for index in chosen], photos.labels_N[chosen]
    found = stages(bundle, images, runs)
    spec = bundle.manifest.preprocessing
    measured = measure(bundle, Samples([preprocess(image, spec) for image in images], [labels_N]), "photos")
    return Recording(
        bundle.manifest.name,
        bundle.fingerprint.hex(),
        "fp32",
        f"{platform.machine()}, {os.cpu_count()} cores; device and cloud share them",
        labels_N=labels_N,
        cloud_N=measured.cloud_TNK[0].argmax(1),
        exits_NEK=measured.exits["fp32"].transpose(1, 0, 2).astype(np.float64),
        points=point_ways(bundle, measured),
        images=image_ways(bundle, images),
        stages=found,
    )
