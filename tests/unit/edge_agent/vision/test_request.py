from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest

from isthmus.edge_agent.config import EdgeConfig
from isthmus.edge_agent.policy.exits import OperatingPoint
from isthmus.edge_agent.vision import request as request_module
from isthmus.edge_agent.vision.operating_points import OperatingPoints
from isthmus.edge_agent.vision.request import (
    InferenceRequest,
    Overrides,
    RequestState,
    resolve_request,
    task_indices,
)
from isthmus.models.errors import InvalidInput
from isthmus.models.vision.bundle import Bundle

Resolve = Callable[..., InferenceRequest]
NO_OVERRIDES = Overrides()


@pytest.fixture
def resolve(tiny_bundle: Bundle) -> Resolve:
    points, config = OperatingPoints(tiny_bundle.manifest), EdgeConfig(tiny_bundle.folder, min_agreement=0.96)

    def call(
        names: Sequence[str] | None = None, overrides: Overrides = NO_OVERRIDES, **settings: object
    ) -> InferenceRequest:
        return resolve_request(points, tiny_bundle.manifest, replace(config, **settings), names, overrides)  # type: ignore[arg-type]

    return call


def test_without_names_the_first_task_is_answered_at_any_good_point(resolve: Resolve) -> None:
    good = (OperatingPoint(0, 0, 2), OperatingPoint(0, 1, 1), OperatingPoint(0, 1, 2), OperatingPoint(1, 0, 1))
    assert resolve() == InferenceRequest((0,), good, forced_split=False, no_exit=None)
    assert resolve(["defect"]) == resolve([]) == resolve()


@pytest.mark.parametrize(
    ("names", "tasks"),
    [
        (["colour"], (1,)),
        (["colour", "defect"], (1, 0)),
        (["defect", "colour"], (0, 1)),
        (["colour", "colour"], (1,)),
    ],
)
def test_tasks_without_an_exit_are_named_in_no_exit(resolve: Resolve, names: list[str], tasks: tuple[int, ...]) -> None:
    request = resolve(names)
    assert (request.tasks, request.forced_split, request.no_exit) == (tasks, False, "exits do not answer colour")


def test_one_name_may_come_without_a_list(resolve: Resolve) -> None:
    assert resolve("colour") == resolve(["colour"])


def test_the_agents_own_tasks_are_used_when_none_is_named(resolve: Resolve) -> None:
    assert resolve(tasks=("colour",)).tasks == (1,)
    assert resolve(["defect"], tasks=("colour",)).tasks == (0,)


@pytest.mark.parametrize(
    ("overrides", "points", "why"),
    [
        (Overrides("light", 0.5, 0), [(0, 0, 0)], "tap light, width 0.5, rate 0 requested"),
        (Overrides("light"), [(0, 0, 2), (0, 1, 1), (0, 1, 2)], "tap light requested"),
        (Overrides(rate=0), [(0, 1, 0)], "rate 0 requested"),  # none of the three is good enough: the best one
        (Overrides(width=0.5), [(0, 0, 2)], "width 0.5 requested"),
    ],
)
def test_overrides_take_precedence_over_quality(
    resolve: Resolve, overrides: Overrides, points: list[tuple[int, int, int]], why: str
) -> None:
    assert resolve(overrides=overrides) == InferenceRequest(
        (0,), tuple(OperatingPoint(*p) for p in points), forced_split=True, no_exit=why
    )


def test_overrides_hold_in_any_mode(resolve: Resolve) -> None:
    for mode in ("auto", "edge", "offload", "split"):
        assert resolve(overrides=Overrides("deep"), mode=mode).forced_split


def test_mode_split_forces_a_split(resolve: Resolve) -> None:
    request = resolve(mode="split")
    assert (request.forced_split, request.no_exit, request.points) == (True, "mode split", resolve().points)


@pytest.mark.parametrize("name", ["", "Defect", "defect ", "cell_type", "x" * 1000])
def test_an_unknown_task_is_refused_in_one_line(tiny_bundle: Bundle, name: str) -> None:
    with pytest.raises(InvalidInput, match="does not exist, there are defect, colour") as caught:
        task_indices(tiny_bundle.manifest, ["defect", name])
    assert len(str(caught.value)) < 150


class Clock:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def monotonic(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(request_module, "time", made)
    return made


@pytest.fixture
def state(clock: Clock) -> RequestState:
    return RequestState(InferenceRequest((0,), (), forced_split=False, no_exit=None), deadline_s=2.0)


def test_the_deadline_counts_from_the_start(state: RequestState, clock: Clock) -> None:
    assert state.left_s == 2.0
    clock.now_s += 3.0
    assert state.left_s == -1.0


def test_a_stage_that_runs_twice_adds_up_even_if_it_fails(state: RequestState, clock: Clock) -> None:
    with state.stage("head"):
        clock.now_s += 0.5
    with pytest.raises(InvalidInput), state.stage("head"):
        clock.now_s += 0.25
        raise InvalidInput("x")
    assert state.stage_ms == {"head": 750.0}


def test_computation_is_summed_for_each_side(state: RequestState) -> None:
    assert (state.device_s, state.cloud_s) == (0.0, 0.0)
    state.stage_ms = {"decode": 1000, "head": 2000, "encode": 4000, "cloud": 64_000, "cloud_compute": 8000}
    assert (state.device_s, state.cloud_s) == (7.0, 8.0)
