"""The answer to one photo, and how it is printed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from numpy.typing import NDArray

from isthmus.edge_agent.policy.exits import Candidate
from isthmus.edge_agent.vision.request import RequestState
from isthmus.models.vision.tasks import Task

AnswerRoute = Literal["exit", "split", "offload", "fallback"]


@dataclass(frozen=True, slots=True)
class TaskAnswer:
    """The answer to one task: its most likely label, the index of that label, and the probabilities of all labels."""

    label: str
    index: int
    probabilities: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Answer:
    """`route` says who answered: an exit, the cloud (split or whole image), or the best exit in place of the cloud.

    label, index, probabilities: of the first task requested; of the bundle's first task if that one is missing.
    answers: by name of the task. missing: requested tasks that have no exit, when the cloud did not answer.
    tap, width, rate: of the bottleneck that was sent, None if none was.
    bytes_up, bytes_down: our messages with gRPC's 5-byte prefix, without HTTP/2. stage_ms: wait (for other photos of
    the device, if it had to), decode, head, encode, cloud (which includes cloud_queue and cloud_compute), total.
    degraded: a cloud is configured and should have answered, but was late or unreachable.
    cost_usd, modelled_joules: by the cost profile; the joules are a model's, not measured. candidates: the ways that
    were considered at the last step, where that was asked for.
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
    modelled_joules: float = 0.0
    candidates: tuple[Candidate, ...] | None = None

    def as_dict(self) -> dict[str, Any]:
        """The fields as JSON has them; candidates only where they were asked for."""
        fields = dataclasses.asdict(self)
        if self.candidates is None:
            del fields["candidates"]
        return fields


def build_answer(
    state: RequestState,
    tasks: Sequence[Task],
    found: Mapping[int, NDArray[Any]],
    *,
    route: AnswerRoute,
    exit_name: str | None,
    point: tuple[str, float, int] | tuple[None, None, None],
    cost_usd: float,
    why: str,
    modelled_joules: float = 0.0,
) -> Answer:
    """`tasks` are the bundle's, `found` the class probabilities of those that were answered, by index."""
    requested = state.request.tasks
    order = [task for task in requested if task in found] or [0]  # exits answer the first task only
    answers = {tasks[task].name: task_answer(tasks[task], found[task]) for task in order}
    first = answers[tasks[order[0]].name]
    tap, width, rate = point
    return Answer(
        label=first.label,
        index=first.index,
        probabilities=first.probabilities,
        answers=answers,
        missing=tuple(tasks[task].name for task in requested if task not in found),
        route=route,
        exit=exit_name,
        tap=tap,
        width=width,
        rate=rate,
        bytes_up=state.up_bytes,
        bytes_down=state.down_bytes,
        stage_ms={name: round(value, 3) for name, value in state.stage_ms.items()},
        degraded=route == "fallback",
        cost_usd=cost_usd,
        modelled_joules=modelled_joules,
        why=why,
        candidates=state.candidates,
    )


def task_answer(task: Task, probabilities_K: NDArray[Any]) -> TaskAnswer:
    """The most likely label of `task`, with all probabilities."""
    index = int(probabilities_K.argmax())
    return TaskAnswer(task.labels[index], index, tuple(float(p) for p in probabilities_K))


def format_answer(photo: str, answer: Answer) -> list[str]:
    """Lines of text for people."""
    named = len(answer.answers) + len(answer.missing) > 1
    labels = [
        f"{name + ' ' if named else ''}{task.label} ({max(task.probabilities):.1%})"
        for name, task in answer.answers.items()
    ]
    labels += [f"{name} MISSING" for name in answer.missing]
    stages = ", ".join(f"{name} {value:.1f}" for name, value in answer.stage_ms.items() if name != "total")
    return [
        f"{photo}: {', '.join(labels)}, {describe_route(answer)}, {answer.stage_ms['total']:.1f} ms",
        f"    why: {answer.why}",
        f"    ms: {stages}",
    ]


def describe_route(answer: Answer) -> str:
    """Who answered, and from what input."""
    if answer.route == "split":
        return f"by the cloud from {answer.bytes_up} B, tap {answer.tap} width {answer.width} rate {answer.rate}"
    if answer.route == "offload":
        return f"by the cloud from the whole image, {answer.bytes_up} B"
    return f"on the device at {answer.exit}" + (", DEGRADED" if answer.degraded else "")
