"""What one request asks for: tasks by name, the tap, width and rate that it is pinned to, and who may answer it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from isthmus.edge_agent.config import EdgeConfig
from isthmus.edge_agent.policy.exits import OperatingPoint
from isthmus.edge_agent.vision.operating_points import OperatingPoints
from isthmus.models.errors import InvalidInput
from isthmus.models.vision.manifest import Manifest


@dataclass(frozen=True, slots=True)
class InferenceRequest:
    """`tasks`: indices, in the order in which they were asked for. `points`: those that may be sent.

    `pinned`: a bottleneck is to be sent whatever the router thinks of it. `no_exit`: why no exit may answer.
    """

    tasks: tuple[int, ...]
    points: tuple[OperatingPoint, ...]
    pinned: bool
    no_exit: str | None


@dataclass(frozen=True, slots=True)
class Overrides:
    """Of one request; None leaves the choice to the router."""

    tap: str | None = None
    width: float | None = None
    rate: int | None = None

    def __str__(self) -> str:
        named = (("tap", self.tap), ("width", self.width), ("rate", self.rate))
        return ", ".join(f"{name} {value}" for name, value in named if value is not None)


def wanted(
    points: OperatingPoints, manifest: Manifest, config: EdgeConfig, names: Sequence[str] | None, pins: Overrides
) -> InferenceRequest:
    """`names` of tasks; None or none of them for the agent's own. Raises InvalidInput naming what there is."""
    tasks = task_indices(manifest, names or config.tasks)
    open_points = points.pinned(pins.tap, pins.width, pins.rate)
    good = points.good(open_points, config.min_agreement)
    if pins != Overrides():
        return InferenceRequest(tasks, good, True, f"{pins} asked for")
    if config.mode == "split":
        return InferenceRequest(tasks, good, True, "mode split")
    others = [manifest.tasks[task].name for task in tasks if task]
    no_exit = f"exits do not answer {', '.join(others)}" if others else None
    return InferenceRequest(tasks, good, False, no_exit)


def task_indices(manifest: Manifest, names: Sequence[str]) -> tuple[int, ...]:
    """Each once, in the order given; the first task when none is named. Raises InvalidInput."""
    names = (names,) if isinstance(names, str) else names
    known = {task.name: index for index, task in enumerate(manifest.tasks)}
    for name in names:
        if name not in known:
            raise InvalidInput(f"task {name[:64]!r} does not exist, there are {', '.join(known)}")
    return tuple(dict.fromkeys(known[name] for name in names)) or (0,)
