"""What one photo has gone through so far, and how long each stage took."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

from isthmus.edge_agent.vision.request import InferenceRequest

Floats = NDArray[np.float32]


class RequestState:
    """One photo on its way: what is wanted, exits passed, features behind the last of them, bytes sent and received."""

    def __init__(self, wanted: InferenceRequest, deadline_s: float) -> None:
        self.wanted = wanted
        self.started_s = time.monotonic()
        self.deadline_s = self.started_s + deadline_s
        self.stage_ms: dict[str, float] = {}
        self.exits: list[Floats] = []  # probabilities of each exit passed
        self.features: Floats | None = None
        self.up_bytes = 0
        self.down_bytes = 0

    @property
    def left_s(self) -> float:
        return self.deadline_s - time.monotonic()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        started_s = time.monotonic()
        try:
            yield
        finally:
            self.stage_ms[name] = self.stage_ms.get(name, 0.0) + 1000 * (time.monotonic() - started_s)
