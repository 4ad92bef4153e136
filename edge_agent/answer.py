"""What the agent gives back for one photo."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

AnswerRoute = Literal["exit", "split", "offload", "fallback"]


@dataclass(frozen=True, slots=True)
class Answer:
    """`route` says who answered: an exit, the cloud (split or whole image), or the best exit for want of a cloud.

    bytes_up, bytes_down: our messages with gRPC's 5-byte prefix, HTTP/2 apart. stage_ms: decode, head, encode, cloud
    (cloud_queue and cloud_compute are parts of it), total. degraded: the owner's quality was not to be had.
    cost_usd: at the configured prices.
    """

    label: str
    index: int
    probabilities: tuple[float, ...]
    route: AnswerRoute
    exit: str | None
    rate: int | None
    bytes_up: int
    bytes_down: int
    stage_ms: dict[str, float]
    degraded: bool
    cost_usd: float
    why: str

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self)
