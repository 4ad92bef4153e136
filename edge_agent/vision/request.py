"""One inference request: what it asks for, resolved against the bundle and the configuration, and its progress."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from isthmus.edge_agent.config import MAX_DEADLINE_S, MIN_DEADLINE_S, EdgeConfig
from isthmus.edge_agent.policy.budgets import Spend
from isthmus.edge_agent.policy.exits import Candidate, OperatingPoint
from isthmus.edge_agent.vision.operating_points import OperatingPoints
from isthmus.models.errors import InvalidInput
from isthmus.models.messages import CloudReply
from isthmus.models.vision.geometry import Geometry
from isthmus.models.vision.manifest import ImageWay, Manifest
from isthmus.models.vision.outputs import ExitOutput

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class InferenceRequest:
    """`tasks`: indices, in the order requested. `points`: the operating points that may be sent.

    `forced_split`: a bottleneck must be sent, whatever the router prefers. `no_exit`: why no exit may answer, or None.
    `private`: nothing of it leaves the device. `whole`: a whole image is good enough.
    """

    tasks: tuple[int, ...]
    points: tuple[OperatingPoint, ...]
    forced_split: bool
    no_exit: str | None
    private: bool = False
    whole: bool = True


@dataclass(frozen=True, slots=True)
class Overrides:
    """What a request asks for: an operating point, of which None leaves the choice to the router; to stay private."""

    tap: str | None = None
    width: float | None = None
    rate: int | None = None
    private: bool = False

    @property
    def forces(self) -> bool:
        """Whether a bottleneck must be sent."""
        return (self.tap, self.width, self.rate) != (None, None, None)

    def __str__(self) -> str:
        named = (("tap", self.tap), ("width", self.width), ("rate", self.rate))
        return ", ".join(f"{name} {value}" for name, value in named if value is not None)


class RequestState:
    """Progress of one request: exits run, features after the last of them, bytes sent, and the time of each stage."""

    def __init__(self, request: InferenceRequest, deadline_s: float, explain: bool = False) -> None:
        """The clock of the deadline starts now. `explain`: the ways that were considered are kept."""
        self.request, self.explain = request, explain
        self.candidates: tuple[Candidate, ...] | None = None  # at the last step
        self.charge: Callable[[int], None] = lambda up_bytes: None  # called before a message is sent; may raise
        self.allowance: Spend | None = (
            None  # of the budgets at its first step, less what is reserved beyond the expected
        )
        self.joules = 0.0  # modelled, of what was sent and waited for
        self.started_s = time.monotonic()
        self.deadline_s = self.started_s + deadline_s
        self.stage_ms: dict[str, float] = {}
        self.exits: list[ExitOutput] = []  # what each exit run gave
        self.score: float | None = None  # of the last exit run, as `exit_score` says
        self.features: Floats | None = None
        self.first_features: Floats | None = None  # after the first segment
        self.geometry: Geometry | None = None  # from the network's input back to the photo
        self.image: ImageWay | None = None  # how the router would send it whole
        self.up_bytes = 0
        self.down_bytes = 0
        self.detours: list[str] = []  # clouds that it was sent to in vain, and where it was sent then
        self.cancelled = False  # nobody waits for the answer any more
        self.device_only: str | None = None  # why nothing of it may be sent

    @property
    def left_s(self) -> float:
        """Seconds until the deadline."""
        return self.deadline_s - time.monotonic()

    @property
    def waited(self) -> bool:
        """Whether other photos of this device were served first."""
        return "wait" in self.stage_ms

    @property
    def device_s(self) -> float:
        """Seconds that the device has computed for this request."""
        return sum(self.stage_ms.get(name, 0.0) for name in ("decode", "head", "encode")) / 1000

    @property
    def cloud_s(self) -> float:
        """Seconds that the cloud has computed for this request."""
        return self.stage_ms.get("cloud_compute", 0.0) / 1000

    def raise_if_cancelled(self) -> None:
        """Raises CancelledError if nobody waits for the answer any more."""
        if self.cancelled:
            raise CancelledError

    def add_up_bytes(self, size: int) -> None:
        """Count a message that was sent."""
        self.up_bytes += size

    def add_reply(self, reply: CloudReply, down_bytes: int) -> None:
        """Count the reply of a cloud, and what it spent."""
        self.down_bytes = down_bytes
        self.stage_ms["cloud_queue"] = 1000 * reply.queue_s
        self.stage_ms["cloud_compute"] = 1000 * reply.compute_s

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time of the block to `stage_ms[name]`, in milliseconds."""
        started_s = time.monotonic()
        try:
            yield
        finally:
            self.stage_ms[name] = self.stage_ms.get(name, 0.0) + 1000 * (time.monotonic() - started_s)


def resolve_request(
    points: OperatingPoints, manifest: Manifest, config: EdgeConfig, names: Sequence[str] | None, overrides: Overrides
) -> InferenceRequest:
    """Resolve task `names` (the agent's own tasks if there are none) and `overrides`.

    Raises InvalidInput that lists the names or values there are.
    """
    tasks = task_indices(manifest, names or config.tasks)
    selected = points.select(overrides.tap, overrides.width, overrides.rate)
    good = points.good_enough(selected, config.min_agreement)
    others = [manifest.tasks[task].name for task in tasks if task]
    no_exit = f"exits do not answer {', '.join(others)}" if others else None
    if overrides.private:
        if overrides.forces:
            raise InvalidInput(f"private photos are not sent, but {overrides} was requested")
        return InferenceRequest(tasks, good, False, no_exit, private=True)
    if overrides.forces:
        return InferenceRequest(tasks, good, True, f"{overrides} requested")
    if config.mode == "split":
        return InferenceRequest(tasks, good, True, "mode split")
    image, least = image_of(points, config), points.least(selected, config.min_agreement)
    return InferenceRequest(tasks, good, False, no_exit, whole=image.agreement >= least)


def images_of(points: OperatingPoints, config: EdgeConfig) -> Sequence[ImageWay]:
    """All that are good enough for the agent to send a whole photo so; none beside a pinned one."""
    if config.whole_image.form or config.whole_image.quality:
        return ()
    least = points.least(tuple(points.figures), config.min_agreement)
    return [way for way in points.images if way.agreement >= least]


def image_of(points: OperatingPoints, config: EdgeConfig) -> ImageWay:
    """How the agent sends a whole photo."""
    least, pinned = points.least(tuple(points.figures), config.min_agreement), config.whole_image
    best = config.objective == "best"
    return points.image(least, best=best, form=pinned.form, quality=pinned.quality)


def resolve_deadline(config: EdgeConfig, requested_s: float | None) -> float:
    """Seconds of one request; the agent's own if none are requested. Raises InvalidInput as the settings do."""
    if requested_s is None:
        return config.deadline_s
    number = isinstance(requested_s, int | float | np.number)
    if not number or not MIN_DEADLINE_S <= requested_s <= MAX_DEADLINE_S:
        raise InvalidInput(f"deadline_s is {requested_s!r}, expected {MIN_DEADLINE_S} to {MAX_DEADLINE_S}")
    return requested_s


def task_indices(manifest: Manifest, names: Sequence[str]) -> tuple[int, ...]:
    """Indices of tasks by name, without duplicates, in the given order; the first task for no names.

    Raises InvalidInput for a name that does not exist.
    """
    names = (names,) if isinstance(names, str) else names
    if not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        raise InvalidInput(f"tasks are {names!r:.64}, expected a list of names")
    known = {task.name: index for index, task in enumerate(manifest.tasks)}
    for name in names:
        if name not in known:
            raise InvalidInput(f"task {name[:64]!r} does not exist, there are {', '.join(known)}")
    return tuple(dict.fromkeys(known[name] for name in names)) or (0,)
