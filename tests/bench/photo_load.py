"""Load on a cloud service for photos: devices that send prepacked bottlenecks as fast as these are answered.

    prepack    a sample photo, shifted and mirrored -> payloads of the bundle's middle rate
    Devices    each with connections of its own to one or several clouds, and some photos in flight
    run        sends so many photos -> Load: photos a second, and how often each was answered

A device sends as an agent does, by its `Replicas`: what waits, resends and gives up is the code that devices run.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
from PIL import Image, ImageChops, ImageOps

from isthmus.edge_agent.config import EdgeConfig
from isthmus.edge_agent.vision.replicas import Replicas, connect
from isthmus.edge_agent.vision.request import InferenceRequest, RequestState
from isthmus.models.errors import IsthmusError
from isthmus.models.messages import CloudReply, Codec, Payload
from isthmus.models.vision.bundle import Bundle
from isthmus.models.vision.head import Head
from isthmus.models.vision.images import preprocess

CLOUD_S = 0.1  # what a cloud may need for a photo, as far as a device knows
TOLERANCE = 0.01  # of a probability, between batches of other sizes
CONNECT_S = 20.0


@dataclass(frozen=True)
class Load:
    """What became of the photos. `lost`: without an answer; `doubled`: with two; `wrong`: with another photo's.

    `resent`: those that a device sent to another cloud.
    """

    photos: int
    seconds: float
    p50_ms: float
    p99_ms: float
    lost: int
    doubled: int
    wrong: int
    resent: int
    errors: tuple[str, ...] = ()

    @property
    def photos_per_s(self) -> float:
        return self.photos / self.seconds

    def as_dict(self) -> dict[str, Any]:
        """The fields and the rate, as JSON has them."""
        return {**asdict(self), "photos_per_s": round(self.photos_per_s, 2)}


def prepack(bundle: Bundle, photo: Image.Image, count: int) -> list[Payload]:
    """Payloads of `count` different photos at the first tap's middle rate and full width."""
    manifest, head, codec = bundle.manifest, Head(bundle, 1), bundle.codec(0)
    tap, after = manifest.taps[0], manifest.architecture.taps[0].after
    width, rate = len(tap.widths) - 1, len(tap.widths[-1].rates) // 2
    payloads = []
    for index in range(count):
        shifted = ImageChops.offset(ImageOps.mirror(photo) if index % 2 else photo, 7 * index, 3 * index)
        x_CHW = preprocess(shifted, manifest.preprocessing)
        for segment in range(after):
            x_CHW = head.segment(segment, x_CHW)[0]
        used, data = codec.compress(head.encode(0, x_CHW, width), rate)
        payloads.append(Payload(Codec.BOTTLENECK, 0, used, data))
    return payloads


class Devices:
    """Several agents' connections, without the agents. `targets`: the clouds of each device, in order of preference."""

    def __init__(self, bundle: Bundle, targets: Sequence[tuple[str, ...]], in_flight: int) -> None:
        """Waits until each device has a cloud."""
        self._in_flight = in_flight
        self.late = 0  # replies after the end of their request, a race between threads may lose one
        config = partial(EdgeConfig, bundle.folder, mode="split", connect_s=CONNECT_S)
        self._replicas = [
            connect(config(clouds=clouds), bundle.manifest, bundle.fingerprint, self._count_late) for clouds in targets
        ]

    def run(self, payloads: Sequence[Payload], photos: int, deadline_s: float) -> Load:
        """Send `photos`, the payloads in turn, and wait for each at most `deadline_s`."""
        expected = [self._send(self._replicas[0], payload, deadline_s)[0] for payload in payloads]
        run = Run(itertools.count(), photos, deadline_s, payloads, expected)
        started_s = time.monotonic()
        with ThreadPoolExecutor(len(self._replicas) * self._in_flight) as threads:
            workers = [
                threads.submit(run.work, partial(self._send, replicas))
                for replicas in self._replicas
                for _ in range(self._in_flight)
            ]
        for worker in workers:
            worker.result()
        return run.load(time.monotonic() - started_s)

    def close(self) -> None:
        """Close the connections."""
        for replicas in self._replicas:
            replicas.close()

    def _count_late(self) -> None:
        self.late += 1

    @staticmethod
    def _send(replicas: Replicas, payload: Payload, deadline_s: float) -> tuple[CloudReply, int]:
        """The reply, and how often the photo was sent to another cloud."""
        state = RequestState(InferenceRequest((0,), (), True, None), deadline_s)
        exchange = replicas.infer(payload, (0,), state, lambda: state.left_s, CLOUD_S)
        return exchange.reply, len(state.detours)


class Run:
    """One run's photos, taken one by one by many threads."""

    def __init__(
        self,
        numbers: Iterator[int],
        photos: int,
        deadline_s: float,
        payloads: Sequence[Payload],
        expected: Sequence[CloudReply],
    ) -> None:
        self._numbers, self._photos, self._deadline_s = numbers, photos, deadline_s
        self._payloads, self._expected = payloads, expected
        self._answers = [0] * photos
        self._times_ms: list[float] = []
        self._errors: list[str] = []
        self._wrong = self._resent = 0
        self._lock = threading.Lock()

    def work(self, send: Any) -> None:
        """Send photos until there are no more."""
        while (number := next(self._numbers)) < self._photos:
            which = number % len(self._payloads)
            started_s = time.monotonic()
            try:
                reply, resent = send(self._payloads[which], self._deadline_s)
            except IsthmusError as error:
                self._errors.append(str(error))
                continue
            took_ms = 1000 * (time.monotonic() - started_s)
            right = np.allclose(reply.probabilities[0], self._expected[which].probabilities[0], atol=TOLERANCE)
            with self._lock:
                self._answers[number] += 1
                self._times_ms.append(took_ms)
                self._wrong += not right
                self._resent += resent

    def load(self, seconds: float) -> Load:
        """What became of all of them."""
        p50_ms, p99_ms = np.percentile(self._times_ms or [0.0], [50, 99])
        return Load(
            self._photos,
            seconds,
            round(float(p50_ms), 2),
            round(float(p99_ms), 2),
            lost=self._answers.count(0),
            doubled=sum(count > 1 for count in self._answers),
            wrong=self._wrong,
            resent=self._resent,
            errors=tuple(sorted(set(self._errors)))[:5],
        )


@contextmanager
def devices(bundle: Bundle, targets: Sequence[tuple[str, ...]], in_flight: int) -> Iterator[Devices]:
    """Devices that are closed afterwards."""
    made = Devices(bundle, targets, in_flight)
    try:
        yield made
    finally:
        made.close()
