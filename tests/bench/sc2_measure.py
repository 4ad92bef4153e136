"""One method at one setting, photo by photo: bytes sent, time on each side, the cloud's answer. Stored between runs.

Bytes are counted three times: `payload` is the encoder's output. `data` is measured as by sc2bench's FileSizeAnalyzer:
the size of a pickled Python object with strings and shape for bottlenecks (some 105 bytes more than the payload);
the file for image codecs. `wire` is our whole request with gRPC's prefix, before HTTP/2.
Source: Matsubara et al., "SC2 Benchmark: Supervised Compression for Split Computing", TMLR 2023.
"""

from __future__ import annotations

import hashlib
import pickle
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from isthmus.models.messages import CloudRequest, Codec, Payload
from isthmus.models.vision.images import preprocess
from isthmus.models.vision.manifest import Preprocessing
from isthmus.protos.wire import pack_request
from tests.bench.sc2_ways import Floats, Photo, Way

GRPC_PREFIX_BYTES = 5  # compression flag and length of a message
SHAPE = torch.Size([19, 19])  # of a latent; every shape with sides below 256 is pickled to as many bytes
BUDGET_S = 1.0  # an agent's usual deadline; a longer one may need one byte more


@dataclass(frozen=True)
class Measured:
    """One entry a photo. `cloud_ms_N`: decoding and tail; `decode_ms_N` is NaN where the two are not separate."""

    answer_N: NDArray[np.int64]
    payload_bytes_N: NDArray[np.int64]
    data_bytes_N: NDArray[np.int64]
    wire_bytes_N: NDArray[np.int64]
    encode_ms_N: NDArray[np.float64]
    decode_ms_N: NDArray[np.float64]
    cloud_ms_N: NDArray[np.float64]


@dataclass(frozen=True)
class Trip:
    """One photo's payload, answer and times."""

    data: bytes
    probabilities_K: Floats
    encode_ms: float
    decode_ms: float
    cloud_ms: float


@dataclass(frozen=True)
class Bench:
    """The photos and settings of all measurements. `folder` stores finished ones."""

    images: Sequence[Image.Image]  # RGB
    preprocessing: Preprocessing
    fingerprint: bytes  # of the bundle, as requests carry it
    folder: Path

    def measure(self, way: Way, advance: Callable[[], None] = lambda: None) -> Measured:
        """Measure all photos, or load the measurement from `folder`. `advance` is called once a photo."""
        path = self.folder / f"{self.key(way)}.npz"
        if path.exists():
            with np.load(path) as kept:
                measured = Measured(**{field.name: kept[field.name] for field in fields(Measured)})
            for _ in self.images:
                advance()
            return measured
        trips = []
        for image in self.images:
            trips.append(travel(way, self.photo(image)))
            advance()
        measured = self.columns(way, trips)
        self.folder.mkdir(parents=True, exist_ok=True)
        with path.with_suffix(".partial").open("wb") as file:
            np.savez(file, **vars(measured))
        path.with_suffix(".partial").rename(path)
        return measured

    def key(self, way: Way) -> str:
        """File name of a measurement: a hash of the first photo's result, which changes with weights or framing."""
        trip = travel(way, self.photo(self.images[0]))
        sizes = (data_bytes(way, trip.data), wire_bytes(way, trip.data, self.fingerprint, 1))
        about = repr((way.method, way.setting, len(self.images), torch.get_num_threads(), sizes)).encode()
        return hashlib.sha256(about + trip.data + trip.probabilities_K.round(4).tobytes()).hexdigest()[:32]

    def photo(self, image: Image.Image) -> Photo:
        return Photo(image, preprocess(image, self.preprocessing))

    def columns(self, way: Way, trips: Sequence[Trip]) -> Measured:
        return Measured(
            answer_N=np.array([trip.probabilities_K.argmax() for trip in trips]),
            payload_bytes_N=np.array([len(trip.data) for trip in trips]),
            data_bytes_N=np.array([data_bytes(way, trip.data) for trip in trips]),
            wire_bytes_N=np.array(
                [wire_bytes(way, trip.data, self.fingerprint, number) for number, trip in enumerate(trips, 1)]
            ),
            encode_ms_N=np.array([trip.encode_ms for trip in trips]),
            decode_ms_N=np.array([trip.decode_ms for trip in trips]),
            cloud_ms_N=np.array([trip.cloud_ms for trip in trips]),
        )


def travel(way: Way, photo: Photo) -> Trip:
    """One photo, timed on each side."""
    data, encode_ms = timed(way.encode, photo)
    received, decode_ms = timed(way.decode, data) if way.decode else (data, 0.0)
    probabilities_K, answer_ms = timed(way.answer, received)
    return Trip(data, probabilities_K, encode_ms, decode_ms if way.decode else float("nan"), decode_ms + answer_ms)


def timed(call: Callable[[Any], Any], argument: Any) -> tuple[Any, float]:
    started_s = time.perf_counter()
    result = call(argument)
    return result, 1000 * (time.perf_counter() - started_s)


def data_bytes(way: Way, data: bytes) -> int:
    """SC2's data size, in bytes."""
    if way.codec is Codec.IMAGE:
        return len(data)
    return sys.getsizeof(pickle.dumps({"strings": [[data]], "shape": SHAPE}))


def wire_bytes(way: Way, data: bytes, fingerprint: bytes, number: int) -> int:
    """Our request as one gRPC message; `number` is its request id."""
    request = CloudRequest(number, fingerprint, BUDGET_S, Payload(way.codec, way.tap, way.rate, data))
    return int(pack_request(request).ByteSize()) + GRPC_PREFIX_BYTES
