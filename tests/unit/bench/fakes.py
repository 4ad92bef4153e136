"""Stand-ins for trained runs and for measurements, so that nothing is trained or timed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import ArrayLike

from isthmus.models.errors import InvalidInput
from isthmus.models.messages import Codec
from isthmus.models.vision.split import SplitClassifier
from tests.bench.sc2_measure import Measured
from tests.bench.sc2_ways import Floats, Way


@dataclass
class FakeBaseline:
    """Sends the mean grey of a photo, repeated `length` times, and answers by it."""

    method: str = "n0"
    setting: str = "price 3"
    length: int = 20
    encoder_bits: int = 8 * 2048
    encoder_macs: int = 5_000_000
    encoded: int = 0  # photos so far
    offset: float = 0.0  # of the answer

    def encode(self, images_B3HW: torch.Tensor) -> list[bytes]:
        assert images_B3HW.dtype == torch.float32 and images_B3HW.shape[1] == 3
        self.encoded += len(images_B3HW)
        return [bytes([int(64 * (float(image.mean()) + 2)) % 256]) * self.length for image in images_B3HW]

    def answer(self, payloads: Sequence[bytes]) -> Floats:
        found = np.array([[data[0] / 255 + self.offset, 0.5] for data in payloads], np.float32)
        probabilities_BK: Floats = found / found.sum(1, keepdims=True)
        return probabilities_BK


@dataclass
class FakeBaselines:
    """Stands for the module `models.recipes.vision.baselines`."""

    ready: list[FakeBaseline] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)

    def trained(self, work: object, methods: Sequence[str], split: SplitClassifier) -> list[FakeBaseline]:
        self.asked += methods
        if missing := set(methods) - {baseline.method for baseline in self.ready}:
            raise InvalidInput(f"{missing} are missing")
        return [baseline for baseline in self.ready if baseline.method in methods]


def way(method: str, setting: str = "s", codec: Codec = Codec.BOTTLENECK, **changes: int) -> Way:
    """A way whose functions are never called."""

    def never(_: object) -> Floats:
        raise AssertionError

    figures = {"encoder_bits": 0, "encoder_macs": 0, "tap": 0, "rate": 0, **changes}
    return Way(method, setting, codec=codec, encode=never, decode=None, answer=never, **figures)  # type: ignore[arg-type]


def measured(answer_N: ArrayLike, size: float, decode_ms: float = float("nan")) -> Measured:
    """As if every photo had taken `size` bytes."""
    count = len(np.asarray(answer_N))
    sizes_N = np.full(count, round(size))
    return Measured(
        answer_N=np.asarray(answer_N, np.int64),
        payload_bytes_N=sizes_N,
        data_bytes_N=sizes_N + 104,
        wire_bytes_N=sizes_N + 30,
        encode_ms_N=np.full(count, 2.0),
        decode_ms_N=np.full(count, decode_ms),
        cloud_ms_N=np.full(count, 20.0),
    )
