"""The answer to one photo, and how it is printed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from PIL import Image

from isthmus.edge_agent.policy.exits import Candidate
from isthmus.edge_agent.vision.image_input import Photo, as_image
from isthmus.edge_agent.vision.request import RequestState
from isthmus.edge_agent.vision.task_answers import Classification, TaskAnswer
from isthmus.models.vision.tasks import Task

LEADING = ("label", "index", "probabilities")  # fields that repeat the first task's answer
AnswerRoute = Literal["exit", "split", "offload", "fallback"]


@dataclass(frozen=True, slots=True)
class Answer:
    """`route` says who answered: an exit, the cloud (split or whole image), or the best exit in place of the cloud.

    label, index, probabilities: of the first task requested; of the bundle's first task if that one is missing. None
    where that task does not classify; `answers` has what was found.
    answers: by name of the task. missing: requested tasks that have no exit, when the cloud did not answer.
    tap, width, rate: of the bottleneck that was sent, None if none was.
    bytes_up, bytes_down: our messages with gRPC's 5-byte prefix, without HTTP/2. stage_ms: wait (for other photos of
    the device, if it had to), decode, head, encode, cloud (which includes cloud_queue and cloud_compute), total.
    degraded: a cloud is configured and should have answered, but was late or unreachable.
    cost_usd, modelled_joules: by the cost profile; the joules are a model's, not measured. candidates: the ways that
    were considered at the last step, where that was asked for.
    """

    label: str | None
    index: int | None
    probabilities: tuple[float, ...] | None
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

    def plot(self, photo: Photo) -> Image.Image:
        """A copy of the photo with the answers to all tasks drawn on it."""
        image = as_image(photo)
        for found in self.answers.values():
            image = found.draw(image)
        return image

    def as_dict(self) -> dict[str, Any]:
        """The fields as JSON has them, led by the first task's answer; candidates only where they were asked for."""
        answers = {name: answer.to_json() for name, answer in self.answers.items()}
        first = next(iter(answers.values()), {})
        rest = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)[len(LEADING) :]}
        candidates = rest.pop("candidates")
        if candidates is not None:
            rest["candidates"] = [dataclasses.asdict(each) for each in candidates]
        return {**first, **rest, "answers": answers}


def build_answer(
    state: RequestState,
    tasks: Sequence[Task],
    found: Mapping[int, TaskAnswer],
    *,
    route: AnswerRoute,
    exit_name: str | None,
    point: tuple[str, float, int] | tuple[None, None, None],
    cost_usd: float,
    why: str,
    modelled_joules: float = 0.0,
) -> Answer:
    """`tasks` are the bundle's, `found` the answers to those that were answered, by index."""
    requested = state.request.tasks
    order = [task for task in requested if task in found] or list(found)  # exits answer the first task only
    answers = {tasks[task].name: found[task] for task in order}
    first = next(iter(answers.values()), None)
    lead = first if isinstance(first, Classification) else None
    tap, width, rate = point
    return Answer(
        label=lead.label if lead else None,
        index=lead.index if lead else None,
        probabilities=lead.probabilities if lead else None,
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


def format_answer(photo: str, answer: Answer) -> list[str]:
    """Lines of text for people."""
    named = len(answer.answers) + len(answer.missing) > 1
    labels = [f"{name + ' ' if named else ''}{found}" for name, found in answer.answers.items()]
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
