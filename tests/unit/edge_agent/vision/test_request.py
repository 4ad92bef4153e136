from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest

from isthmus.edge_agent.config import EdgeConfig
from isthmus.edge_agent.policy.exits import OperatingPoint
from isthmus.edge_agent.vision.operating_points import OperatingPoints
from isthmus.edge_agent.vision.request import InferenceRequest, Overrides, task_indices, wanted
from isthmus.models.errors import InvalidInput
from isthmus.models.vision.bundle import Bundle

GenerationRequest = Callable[..., InferenceRequest]
NO_PINS = Overrides()


@pytest.fixture
def ask(tiny_bundle: Bundle) -> GenerationRequest:
    points, config = OperatingPoints(tiny_bundle.manifest), EdgeConfig(tiny_bundle.folder, min_agreement=0.96)

    def asked(names: Sequence[str] | None = None, pins: Overrides = NO_PINS, **settings: object) -> InferenceRequest:
        return wanted(points, tiny_bundle.manifest, replace(config, **settings), names, pins)  # type: ignore[arg-type]

    return asked


def test_who_asks_for_nothing_gets_the_first_task_any_good_way(ask: GenerationRequest) -> None:
    good = (OperatingPoint(0, 0, 2), OperatingPoint(0, 1, 1), OperatingPoint(0, 1, 2), OperatingPoint(1, 0, 1))
    assert ask() == InferenceRequest((0,), good, pinned=False, no_exit=None)
    assert ask(["defect"]) == ask([]) == ask()


@pytest.mark.parametrize(
    ("names", "tasks"),
    [
        (["colour"], (1,)),
        (["colour", "defect"], (1, 0)),
        (["defect", "colour"], (0, 1)),
        (["colour", "colour"], (1,)),
    ],
)
def test_what_no_exit_knows_is_said(ask: GenerationRequest, names: list[str], tasks: tuple[int, ...]) -> None:
    wish = ask(names)
    assert (wish.tasks, wish.pinned, wish.no_exit) == (tasks, False, "exits do not answer colour")


def test_one_name_may_come_without_a_list(ask: GenerationRequest) -> None:
    assert ask("colour") == ask(["colour"])


def test_the_agents_own_tasks_are_for_who_names_none(ask: GenerationRequest) -> None:
    assert ask(tasks=("colour",)).tasks == (1,)
    assert ask(["defect"], tasks=("colour",)).tasks == (0,)


@pytest.mark.parametrize(
    ("pins", "points", "why"),
    [
        (Overrides("light", 0.5, 0), [(0, 0, 0)], "tap light, width 0.5, rate 0 asked for"),
        (Overrides("light"), [(0, 0, 2), (0, 1, 1), (0, 1, 2)], "tap light asked for"),
        (Overrides(rate=0), [(0, 1, 0)], "rate 0 asked for"),  # none of the three is good enough: the best of them
        (Overrides(width=0.5), [(0, 0, 2)], "width 0.5 asked for"),
    ],
)
def test_pins_come_before_quality_and_quality_before_the_rest(
    ask: GenerationRequest, pins: Overrides, points: list[tuple[int, int, int]], why: str
) -> None:
    assert ask(pins=pins) == InferenceRequest((0,), tuple(OperatingPoint(*p) for p in points), pinned=True, no_exit=why)


def test_pins_hold_in_any_mode(ask: GenerationRequest) -> None:
    for mode in ("auto", "edge", "offload", "split"):
        assert ask(pins=Overrides("deep"), mode=mode).pinned


def test_mode_split_sends_a_bottleneck_whatever_exits_say(ask: GenerationRequest) -> None:
    wish = ask(mode="split")
    assert (wish.pinned, wish.no_exit, wish.points) == (True, "mode split", ask().points)


@pytest.mark.parametrize("name", ["", "Defect", "defect ", "cell_type", "x" * 1000])
def test_a_task_that_is_not_there_is_refused_in_one_line(tiny_bundle: Bundle, name: str) -> None:
    with pytest.raises(InvalidInput, match="does not exist, there are defect, colour") as caught:
        task_indices(tiny_bundle.manifest, ["defect", name])
    assert len(str(caught.value)) < 150
