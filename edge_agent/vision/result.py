"""What the agent gives back for one photo."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

AnswerRoute = Literal["exit", "split", "offload", "fallback"]


@dataclass(frozen=True, slots=True)
class TaskAnswer:
    """What one task says: its likeliest label, that label's index, and the probabilities of all labels."""

    label: str
    index: int
    probabilities: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Answer:
    """`route` says who answered: an exit, the cloud (split or whole image), or the best exit for want of a cloud.

    label, index, probabilities: of the first task asked for; of the bundle's first when that one is missing.
    answers: by name of the task. missing: tasks asked for that no exit knows, when the cloud was out.
    tap, width, rate: of the bottleneck that was sent, None when none was.
    bytes_up, bytes_down: our messages with gRPC's 5-byte prefix, HTTP/2 apart. stage_ms: decode, head, encode, cloud
    (cloud_queue and cloud_compute are parts of it), total. degraded: the owner's quality was not to be had.
    cost_usd: at the configured prices.
    """

    label: str
    index: int
    probabilities: tuple[float, ...]
    answers: Mapping[str, TaskAnswer]
    missing: tuple[str, ...]
    route: AnswerRoute
    exit: str | None
    tap: str | None
    width: float | None
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


def page(photo: str, answer: Answer) -> list[str]:
    """An answer for a person."""
    named = len(answer.answers) + len(answer.missing) > 1
    said = [
        f"{name + ' ' if named else ''}{task.label} ({max(task.probabilities):.1%})"
        for name, task in answer.answers.items()
    ]
    said += [f"{name} MISSING" for name in answer.missing]
    stages = ", ".join(f"{name} {value:.1f}" for name, value in answer.stage_ms.items() if name != "total")
    return [
        f"{photo}: {', '.join(said)}, {whence(answer)}, {answer.stage_ms['total']:.1f} ms",
        f"    why: {answer.why}",
        f"    ms: {stages}",
    ]


def whence(answer: Answer) -> str:
    """Who answered, and from what."""
    if answer.route == "split":
        return f"by the cloud from {answer.bytes_up} B, tap {answer.tap} width {answer.width} rate {answer.rate}"
    if answer.route == "offload":
        return f"by the cloud from the whole image, {answer.bytes_up} B"
    return f"on the device at {answer.exit}" + (", DEGRADED" if answer.degraded else "")
