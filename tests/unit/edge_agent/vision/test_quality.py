"""The quality of every way of the bundle `photos`: the calibration part chooses, the test part tells."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from isthmus.edge_agent.config import EdgeConfig, WholeImage
from isthmus.edge_agent.cost_profiles import open_profile
from isthmus.edge_agent.policy.estimates import LinkEstimate
from isthmus.edge_agent.policy.exits import Goal, RouteEstimate, Situation, plan
from isthmus.edge_agent.vision.costs import Costs
from isthmus.edge_agent.vision.request import InferenceRequest, Overrides, image_of, images_of, resolve_request
from isthmus.models.vision.bundle import Bundle
from isthmus.models.vision.manifest import ImageWay, Manifest
from tests.bench.processes import ROOT

LINKS = [LinkEstimate(rtt_s, rate) for rate in (3e4, 1.25e5, 6e5, 3e6, 1.25e7, 1.25e8) for rtt_s in (0.005, 0.05, 0.15)]
EQUAL_S = 0.001
SAMPLING = 0.0


@pytest.fixture(scope="module")
def manifest() -> Manifest:
    return Bundle.open(ROOT / "models" / "zoo" / "photos").manifest


def planned(manifest: Manifest, config: EdgeConfig) -> tuple[Costs, InferenceRequest]:
    costs = Costs(manifest, open_profile("wifi"))
    costs.send_whole_as(image_of(costs.points, config), images_of(costs.points, config))
    return costs, resolve_request(costs.points, manifest, config, None, Overrides())


def every_way(manifest: Manifest, costs: Costs, link: LinkEstimate) -> Iterator[tuple[str, RouteEstimate]]:
    """All that could be sent, allowed or not, by the name of its score on the test part."""
    for point in costs.points.figures:
        tap, width, rate = costs.points.parts(point)
        yield f"test {tap} {width:g} rate{rate} accuracy", costs.split(point, link)
    everything = Costs(manifest, open_profile("wifi"))
    everything.send_whole_as(manifest.images[0], manifest.images)
    for image in manifest.images:
        yield f"test {image.form} {image.quality} accuracy", everything.offload(link, image=image)


@pytest.mark.parametrize("link", LINKS, ids=lambda link: f"{link.bytes_per_s:g} B/s {link.rtt_s:g} s")
def test_no_way_that_is_passed_over_at_equal_predicted_time_is_more_accurate(
    manifest: Manifest, link: LinkEstimate
) -> None:
    costs, request = planned(manifest, EdgeConfig(Path("photos")))
    request = replace(request, no_exit="certificates are void")  # what is sent is compared
    goal = Goal("fastest", 2.0)
    situation = Situation("exit0", 0.5, costs.routes(1, link, request, goal), 1e9, None, request.no_exit)
    step = plan(situation, goal)
    image = costs.best_image(link, goal)
    ways = dict(every_way(manifest, costs, link))
    if step.point:
        tap, width, rate = costs.points.parts(step.point)
        name = f"test {tap} {width:g} rate{rate} accuracy"
    else:
        assert image is not None
        name = f"test {image.form} {image.quality} accuracy"
    for other, estimate in ways.items():
        if estimate.seconds <= ways[name].seconds + EQUAL_S:
            assert manifest.scores[other].value <= manifest.scores[name].value, (other, name, step.why)


def test_a_jpeg_below_the_wished_agreement_is_no_option(manifest: Manifest) -> None:
    """At quality 75 it agrees less than the split point, which takes a seventh of its bytes."""
    costs, request = planned(manifest, EdgeConfig(Path("photos")))
    allowed = images_of(costs.points, EdgeConfig(Path("photos")))
    assert ("jpeg", 75) not in [(way.form, way.quality) for way in allowed] and request.whole
    best = max(rate.agreement for rate in costs.points.figures.values())
    assert allowed and all(way.agreement >= best for way in allowed)
    pinned = EdgeConfig(Path("photos"), whole_image=WholeImage("jpeg"))
    costs, request = planned(manifest, pinned)
    assert not request.whole, "pinned or not"
    assert {route.route for route in costs.routes(1, LINKS[-1], request)} == {"split"}


def test_more_bytes_are_worth_more_agreement_on_a_fast_link_only(manifest: Manifest) -> None:
    costs, _ = planned(manifest, EdgeConfig(Path("photos")))
    slow, fast = (costs.best_image(LinkEstimate(0.005, rate), Goal("fastest", 2.0)) for rate in (1e5, 1e9))
    assert slow and fast and slow.mean_bytes < fast.mean_bytes and slow.agreement < fast.agreement
    best = costs.best_image(LinkEstimate(0.005, 1e5), Goal("best", 2.0))
    assert best and best.form == "png"


def test_a_pinned_quality_has_the_figures_of_the_nearest_measured_one(manifest: Manifest) -> None:
    costs = Costs(manifest, open_profile("wifi"))
    pinned = image_of(costs.points, EdgeConfig(Path("photos"), whole_image=WholeImage("webp", 60)))
    nearest: ImageWay = next(way for way in manifest.images if (way.form, way.quality) == ("webp", 50))
    assert pinned == nearest.model_copy(update={"quality": 60})
