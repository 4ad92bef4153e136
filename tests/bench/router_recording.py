"""What every way of a bundle answers to test photos, in how many bytes, and how long its stages take, as JSON.

Measured by `router_record`; the simulator replays it, so that it needs neither the data nor a cloud.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from isthmus.edge_agent.policy.exits import OperatingPoint

FORMS = ("jpeg 50", "jpeg 75", "jpeg 90", "webp 50", "webp 75", "webp 90", "png")
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

    def shuffled(self, seed: int) -> Recording:
        """The same photos in another order."""
        order_N = np.random.default_rng(seed).permutation(len(self))

        def taken(ways: dict[Any, Sent]) -> dict[Any, Sent]:
            return {way: Sent(sent.bytes_N[order_N], sent.answer_N[order_N]) for way, sent in ways.items()}

        return replace(
            self,
            labels_N=self.labels_N[order_N],
            cloud_N=self.cloud_N[order_N],
            exits_NEK=self.exits_NEK[order_N],
            points=taken(self.points),
            images=taken(self.images),
        )

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
