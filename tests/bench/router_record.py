"""Measures a recording: each photo through every way of a bundle, and the seconds of every stage.

    answers   exits, tap x width x rate, and whole images -> real bytes, and what the cloud's model answers to them
    stages    the device's graphs and codecs one by one; a real cloud process on loopback, without an emulated link

Answers are kept photo by photo in a file of JSON lines: a run that is ended goes on where it was.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import track

from isthmus.edge_agent.config import EdgeConfig
from isthmus.edge_agent.policy.exits import OperatingPoint
from isthmus.edge_agent.vision.operating_points import OperatingPoints
from isthmus.edge_agent.vision.replicas import connect
from isthmus.edge_agent.vision.request import InferenceRequest, RequestState
from isthmus.models.messages import Codec, Payload
from isthmus.models.vision.bundle import Bundle
from isthmus.models.vision.graph_tail import GraphTail
from isthmus.models.vision.head import Head
from isthmus.models.vision.images import encode_whole, open_image, preprocess
from isthmus.models.vision.tail import Tail, open_tail
from tests.bench.processes import CloudProcess
from tests.bench.router_recording import FORMS, Recording, Sent, Stages
from tests.bench.sc2_photos import Photos

DEADLINE_S = 30.0
Row = dict[str, Any]


def record(bundle: Bundle, photos: Photos, count: int, cache: Path, runs: int = 30) -> Recording:
    """Measure all of it on `count` photos, drawn with a fixed seed."""
    chosen = np.random.default_rng(0).permutation(len(photos.labels_N))[:count]
    rows = answers(bundle, photos, chosen.tolist(), cache)
    return recording(bundle, photos.labels_N[chosen].tolist(), rows, stages(bundle, photos.image(int(chosen[0])), runs))


def recording(bundle: Bundle, labels: Sequence[int], rows: Sequence[Row], measured: Stages) -> Recording:
    points = list(OperatingPoints(bundle.manifest).figures)
    return Recording(
        bundle.manifest.name,
        bundle.fingerprint.hex(),
        "fp32",
        f"{platform.machine()}, {os.cpu_count()} cores; device and cloud share them",
        labels_N=np.array(labels),
        cloud_N=np.array([row["cloud"] for row in rows]),
        exits_NEK=np.array([row["exits"] for row in rows]),
        points={point: sent(rows, "points", index) for index, point in enumerate(points)},
        images={form: sent(rows, "images", index) for index, form in enumerate(FORMS)},
        stages=measured,
    )


def sent(rows: Sequence[Row], ways: str, index: int) -> Sent:
    """Bytes and answers of one way."""
    pairs_N2 = np.array([row[ways][index] for row in rows])
    return Sent(pairs_N2[:, 0], pairs_N2[:, 1])


def answers(bundle: Bundle, photos: Photos, chosen: Sequence[int], cache: Path) -> list[Row]:
    """A row for each photo; those in `cache` are not measured again."""
    known = {row["photo"]: row for row in kept(cache) if row["bundle"] == bundle.fingerprint.hex()}
    head, tail = Head(bundle, 1), open_tail(bundle)
    for photo in track(chosen, "photos", console=Console(stderr=True), transient=True):
        if photo not in known:
            known[photo] = {"photo": photo, "bundle": bundle.fingerprint.hex()}
            known[photo] |= answer(bundle, head, tail, photos.image(photo))
            with cache.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(known[photo], separators=(",", ":")) + "\n")
    return [known[photo] for photo in chosen]


def kept(cache: Path) -> Iterator[Row]:
    if cache.exists():
        yield from map(json.loads, cache.read_text(encoding="utf-8").splitlines())


def answer(bundle: Bundle, head: Head, tail: Tail | GraphTail, image: Image.Image) -> Row:
    """One photo every way: probabilities of the exits; bytes and answer of each point and form, in their order."""
    spec, taps = bundle.manifest.preprocessing, bundle.manifest.architecture.taps
    features, exits = [preprocess(image, spec)], []
    for index in range(head.exits):
        features_CHW, probabilities_K = head.segment(index, features[-1])
        features.append(features_CHW)
        exits.append([round(float(p), 4) for p in probabilities_K])
    points = []
    for tap, described in enumerate(taps):
        codec = bundle.codec(tap)
        for width in range(len(described.widths)):
            latent_CHW = head.encode(tap, features[described.after], width)
            packed = [codec.compress(latent_CHW, rate) for rate in range(described.rates)]
            latents = [codec.dequantise(codec.decode(data, rate), rate) for rate, data in packed]
            labels = tail.answer_latents(tap, latents, [rate for rate, _ in packed]).argmax(1).tolist()
            points += [[len(data), label] for (_, data), label in zip(packed, labels, strict=True)]
    forms = [encoded(image, form, spec.resize) for form in FORMS]
    labels = tail.answer_images([features[0], *(preprocess(open_image(data), spec) for data in forms)])
    cloud, *whole = labels.argmax(1).tolist()
    return {
        "exits": exits,
        "cloud": cloud,
        "points": points,
        "images": [[len(data), label] for data, label in zip(forms, whole, strict=True)],
    }


def encoded(image: Image.Image, form: str, resize: int) -> bytes:
    """A whole image as an agent sends it."""
    kind, _, quality = form.partition(" ")
    return encode_whole(image, resize, kind, int(quality or 75))  # type: ignore[arg-type]


def timed(runs: int, work: Callable[[], Any]) -> list[float]:
    """Seconds of each of `runs` runs, after two that do not count."""
    found = []
    for _ in range(runs + 2):
        started_s = time.perf_counter()
        work()
        found.append(round(time.perf_counter() - started_s, 6))
    return found[2:]


def stages(bundle: Bundle, image: Image.Image, runs: int) -> Stages:
    """Times of every stage on this machine, the cloud's from a real process on loopback."""
    manifest, head = bundle.manifest, Head(bundle, 1)
    spec, cuts = manifest.preprocessing, [tap.after for tap in manifest.architecture.taps]
    data = encoded(image, "png", spec.resize)
    features = [preprocess(image, spec)]
    for index in range(head.exits):
        features.append(head.segment(index, features[-1])[0])
    codecs = [bundle.codec(tap) for tap in range(len(cuts))]

    def send(tap: int, width: int, rate: int) -> Payload:
        used, packed = codecs[tap].compress(head.encode(tap, features[cuts[tap]], width), rate)
        return Payload(Codec.BOTTLENECK, tap, used, packed)

    points = [
        OperatingPoint(index, len(tap.widths) - 1, len(tap.widths[-1].rates) // 2)
        for index, tap in enumerate(manifest.taps)
    ]
    payloads = [send(point.tap, point.width, point.rate) for point in points]
    payloads.append(Payload(Codec.IMAGE, 0, 0, encoded(image, "jpeg 75", spec.resize)))
    cloud, exchange = cloud_stages(bundle, payloads, runs)
    return Stages(
        decode=timed(runs, lambda: preprocess(open_image(data), spec)),
        segments=[timed(runs, partial(head.segment, index, features[index])) for index in range(head.exits)],
        encode=[
            [timed(runs, partial(send, point.tap, width, point.rate)) for width in range(point.width + 1)]
            for point in points
        ],
        image_encode={form: timed(runs, partial(encoded, image, form, spec.resize)) for form in FORMS},
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
