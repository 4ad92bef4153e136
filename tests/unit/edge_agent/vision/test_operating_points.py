from __future__ import annotations

import pytest

from isthmus.edge_agent.policy.exits import OperatingPoint
from isthmus.edge_agent.vision.operating_points import OperatingPoints
from isthmus.models.errors import InvalidInput
from isthmus.models.vision.bundle import Bundle


@pytest.fixture
def points(tiny_bundle: Bundle) -> OperatingPoints:
    """light at widths 0.5 and 1 and three rates, deep at one width and two rates."""
    return OperatingPoints(tiny_bundle.manifest)


def test_every_tap_width_and_rate_is_a_point_with_its_figures(points: OperatingPoints, tiny_bundle: Bundle) -> None:
    assert len(points.figures) == 2 * 3 + 1 * 2
    for point, figures in points.figures.items():
        assert figures == tiny_bundle.manifest.taps[point.tap].widths[point.width].rates[point.rate]


@pytest.mark.parametrize(
    ("point", "name", "parts", "after"),
    [
        (OperatingPoint(0, 0, 2), "light 0.5 rate 2", ("light", 0.5, 2), 0),
        (OperatingPoint(0, 1, 0), "light 1 rate 0", ("light", 1.0, 0), 0),
        (OperatingPoint(1, 0, 1), "deep rate 1", ("deep", 1.0, 1), 2),
    ],
)
def test_a_point_has_a_name_parts_and_a_place(
    points: OperatingPoints, point: OperatingPoint, name: str, parts: tuple[str, float, int], after: int
) -> None:
    assert (points.name(point), points.parts(point), points.after(point)) == (name, parts, after)


@pytest.mark.parametrize(
    ("least", "good"),
    [
        (0.0, [(0, 0, 0), (0, 0, 1), (0, 0, 2), (0, 1, 0), (0, 1, 1), (0, 1, 2), (1, 0, 0), (1, 0, 1)]),
        (0.96, [(0, 0, 2), (0, 1, 1), (0, 1, 2), (1, 0, 1)]),
        (0.97, [(0, 1, 2)]),
        (1.0, [(0, 1, 2)]),
    ],
)
def test_points_meet_the_owners_quality_or_the_best_one_is_left(
    points: OperatingPoints, least: float, good: list[tuple[int, int, int]]
) -> None:
    assert points.good_enough(tuple(points.figures), least) == tuple(OperatingPoint(*indices) for indices in good)


@pytest.mark.parametrize(
    ("tap", "width", "rate", "left"),
    [
        (None, None, None, 8),
        ("light", None, None, 6),
        ("deep", None, None, 2),
        (None, 0.5, None, 3),
        (None, 1.0, None, 5),
        (None, None, 2, 2),
        (None, None, 1, 3),
        ("light", 0.5, 2, 1),
        ("deep", 1.0, 0, 1),
    ],
)
def test_what_is_not_given_stays_open(
    points: OperatingPoints, tap: str | None, width: float | None, rate: int | None, left: int
) -> None:
    found = points.select(tap, width, rate)
    assert len(found) == left
    for name, share, index in map(points.parts, found):
        assert (tap or name, width or share, index if rate is None else rate) == (name, share, index)


@pytest.mark.parametrize(
    ("tap", "width", "rate", "words"),
    [
        ("medium", None, None, "tap 'medium' does not exist, there are light, deep"),
        ("x" * 1000, None, None, "there are light, deep"),
        (None, 0.3, None, "width 0.3 does not exist, there are 0.5, 1"),
        ("deep", 0.5, None, "width 0.5 does not exist at tap deep, there are 1"),
        (None, float("nan"), None, "width nan does not exist"),
        (None, None, 3, "rate 3 does not exist, there are 0 to 2"),
        (None, None, -1, "rate -1 does not exist, there are 0 to 2"),
        ("deep", 1.0, 2, "rate 2 does not exist at tap deep, there are 0 to 1"),
        ("Light", None, None, "tap 'Light' does not exist"),
        ("a\nb", None, None, "tap 'a\\\\nb' does not exist"),
    ],
)
def test_unknown_values_are_refused_in_one_line(
    points: OperatingPoints, tap: str | None, width: float | None, rate: int | None, words: str
) -> None:
    with pytest.raises(InvalidInput, match=words) as caught:
        points.select(tap, width, rate)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200
