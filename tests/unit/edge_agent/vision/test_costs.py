from __future__ import annotations

import pytest

from isthmus.edge_agent.config import EdgeConfig
from isthmus.edge_agent.cost_profiles import open_profile
from isthmus.edge_agent.policy.estimates import LinkEstimate
from isthmus.edge_agent.policy.exits import Goal, OperatingPoint, RouteEstimate, Situation, plan
from isthmus.edge_agent.policy.prices import Prices
from isthmus.edge_agent.vision.costs import QUICKEST, Costs
from isthmus.edge_agent.vision.request import InferenceRequest, Overrides, resolve_request
from isthmus.models.messages import Codec, Payload
from isthmus.models.vision.bundle import Bundle
from isthmus.models.vision.manifest import ImageWay
from isthmus.protos.limits import MAX_FRAMING_BYTES

LINK = LinkEstimate(rtt_s=0.1, bytes_per_s=1000)
LIGHT, DEEP = OperatingPoint(0, 1, 2), OperatingPoint(1, 0, 1)
NARROW = OperatingPoint(0, 0, 2)
SIZES = {LIGHT: 300, NARROW: 200, DEEP: 400}


@pytest.fixture
def costs(tiny_bundle: Bundle) -> Costs:
    """Calibrated: 10 and 20 ms of head; 4 and 8 ms of the light encoder, 3 ms of the deep one."""
    made = Costs(tiny_bundle.manifest, open_profile("wifi", Prices(1e-6, 1e-3, 1e-4)))
    for average in made.cloud_s_per_mac.values():
        average.value = 0.0
    graphs = [*made.segment_s, *made.encode_s[0], *made.encode_s[1]]
    for graph, seconds in zip(graphs, (0.010, 0.020, 0.004, 0.008, 0.003), strict=True):
        graph.calibrate(seconds)
    made.image_encode_s["jpeg"].value, made.image_bytes.value = 0.005, 2000
    for point, size in SIZES.items():
        made.point_bytes[point].value = size
    return made


@pytest.fixture
def any_route(costs: Costs) -> InferenceRequest:
    return InferenceRequest((0,), (NARROW, LIGHT, DEEP), forced_split=False, no_exit=None)


def names(routes: list[RouteEstimate]) -> list[OperatingPoint | str]:
    return [route.point or route.route for route in routes]


def test_bytes_start_from_the_manifest_and_follow_measurements(tiny_bundle: Bundle) -> None:
    costs = Costs(tiny_bundle.manifest, open_profile("wifi"))
    assert costs.split(LIGHT, LINK).name == f"light 1 rate 2 ({120 + MAX_FRAMING_BYTES} B)"
    costs.point_bytes[LIGHT].observe(300)
    assert costs.split(LIGHT, LINK).name == f"light 1 rate 2 ({300 + MAX_FRAMING_BYTES} B)"
    assert costs.split(NARROW, LINK).name == f"light 0.5 rate 2 ({120 + MAX_FRAMING_BYTES} B)"


@pytest.mark.parametrize(("point", "encoder_s"), [(NARROW, 0.004), (LIGHT, 0.008), (DEEP, 0.003)])
def test_a_split_costs_encoder_link_and_framing(costs: Costs, point: OperatingPoint, encoder_s: float) -> None:
    estimate = costs.split(point, LINK)
    up_bytes = SIZES[point] + MAX_FRAMING_BYTES
    assert estimate.seconds == pytest.approx(encoder_s + 0.1 + up_bytes / 1000)
    assert estimate.usd == pytest.approx(up_bytes * 1e-6 + encoder_s * 1e-4)
    assert (estimate.route, estimate.point) == ("split", point)


def test_a_whole_image_costs_its_bytes(costs: Costs) -> None:
    assert costs.offload(LINK).seconds == pytest.approx(0.005 + 0.1 + (2000 + MAX_FRAMING_BYTES) / 1000)


def test_the_cloud_is_charged_by_its_operations(costs: Costs, tiny_bundle: Bundle) -> None:
    manifest = tiny_bundle.manifest
    before = costs.split(DEEP, LINK).usd, costs.offload(LINK).usd
    for average in costs.cloud_s_per_mac.values():
        average.value = 1e-9
    assert costs.split(DEEP, LINK).usd - before[0] == pytest.approx(manifest.taps[1].tail_macs * 1e-9 * 1e-3)
    whole_macs = manifest.tail_macs + sum(segment.macs for segment in manifest.segments)
    assert costs.offload(LINK).usd - before[1] == pytest.approx(whole_macs * 1e-9 * 1e-3)


@pytest.mark.parametrize(("codec", "tap"), [(Codec.IMAGE, 0), (Codec.BOTTLENECK, 0), (Codec.BOTTLENECK, 1)])
def test_the_clouds_speed_is_measured_by_the_operations_of_what_was_sent(costs: Costs, codec: Codec, tap: int) -> None:
    costs.record_cloud(Payload(codec, tap, 0, b""), 0.5)
    assert costs.cloud_s(codec, tap) == pytest.approx(0.5)


def test_the_clouds_speed_is_averaged_apart_for_images_and_bottlenecks(costs: Costs) -> None:
    """Until both are measured, one is taken to be as quick as the other."""
    image, split = Payload(Codec.IMAGE, 0, 0, b""), Payload(Codec.BOTTLENECK, 1, 0, b"")
    costs.record_cloud(image, 0.5)
    assert costs.cloud_s(Codec.BOTTLENECK, 1) == pytest.approx(0.5 * costs.tail_macs[1] / costs.whole_macs)
    costs.record_cloud(split, 0.001)
    assert costs.cloud_s(Codec.BOTTLENECK, 1) == pytest.approx(0.001)
    assert costs.cloud_s(Codec.IMAGE) == pytest.approx(0.5)


def test_the_best_image_is_the_one_that_is_quick_to_encode_among_equals(costs: Costs) -> None:
    jpeg, webp = (
        ImageWay(form=form, quality=75, mean_bytes=size, accuracy=0.9, agreement=0.95)
        for form, size in (("jpeg", 1100.0), ("webp", 1000.0))
    )
    costs.send_whole_as(jpeg, [webp])
    costs.image_encode_s["webp"].value = 0.5
    assert costs.best_image(LINK, QUICKEST) is jpeg
    costs.image_encode_s["webp"].value = 0.01
    assert costs.best_image(LINK, QUICKEST) is webp
    assert costs.offload(LINK, image=webp).seconds - costs.offload(LINK, image=jpeg).seconds == pytest.approx(
        (1000 - 1100) / LINK.bytes_per_s + 0.01 - 0.005
    )


def test_routes_before_between_and_after_the_exits(costs: Costs, any_route: InferenceRequest) -> None:
    """A tap of the image can be sent at any time, a tap of features only once these are computed."""
    assert [names(costs.routes(passed, LINK, any_route)) for passed in range(3)] == [
        ["offload", NARROW, LIGHT, "continue"],
        ["offload", NARROW, LIGHT, "continue"],
        ["offload", NARROW, LIGHT, DEEP],
    ]


def test_the_head_that_has_run_already_is_not_charged_again(costs: Costs, any_route: InferenceRequest) -> None:
    before, after = (costs.routes(passed, LINK, any_route) for passed in (0, 2))
    assert before[:3] == after[:3]


def test_a_forced_split_is_not_sent_whole_and_continues_only_to_its_tap(costs: Costs) -> None:
    deep, light = (InferenceRequest((0,), (point,), forced_split=True, no_exit="mode split") for point in (DEEP, LIGHT))
    assert [names(costs.routes(passed, LINK, deep)) for passed in range(3)] == [["continue"], ["continue"], [DEEP]]
    assert [names(costs.routes(passed, LINK, light)) for passed in range(3)] == [[LIGHT]] * 3


def test_without_a_link_there_is_only_the_head(costs: Costs, any_route: InferenceRequest) -> None:
    assert [names(costs.routes(passed, None, any_route)) for passed in range(3)] == [["continue"], ["continue"], []]


def test_continuing_expects_the_exit_to_answer_its_share(costs: Costs, any_route: InferenceRequest) -> None:
    costs.exit_share[1].value = 0.25
    later_s = min(route.seconds for route in costs.routes(2, LINK, any_route))
    assert costs.continue_route(1, LINK, any_route).seconds == pytest.approx(0.020 + 0.75 * later_s)


def test_continuing_expects_nothing_of_an_exit_that_may_not_answer(costs: Costs) -> None:
    lacking = InferenceRequest((1,), (DEEP,), forced_split=False, no_exit="exits do not answer colour")
    later_s = min(route.seconds for route in costs.routes(2, LINK, lacking))
    assert costs.continue_route(1, LINK, lacking).seconds == pytest.approx(0.020 + later_s)


FAST = LinkEstimate(rtt_s=0.01, bytes_per_s=50_000)


def chosen(costs: Costs, request: InferenceRequest) -> OperatingPoint | None:
    situation = Situation(None, None, costs.routes(0, FAST, request), left_s=1.0, cloud_refused=None)
    return plan(situation, Goal("fastest", 0.9)).point


def test_a_busy_device_narrows_its_encoder_by_itself_and_an_idle_one_widens_it_again(costs: Costs) -> None:
    """The wide encoder saves 300 bytes, 6 ms of this link, and takes 4 ms longer; under fourfold load 16 ms longer."""
    costs.point_bytes[NARROW].value, costs.point_bytes[LIGHT].value = 600, 300
    request = InferenceRequest((0,), (NARROW, LIGHT), forced_split=False, no_exit="exits do not answer colour")
    assert chosen(costs, request) == LIGHT
    for _ in range(10):
        costs.encode_s[0][1].observe(4 * 0.008, 0.0)
    assert chosen(costs, request) == NARROW
    for _ in range(30):
        costs.encode_s[0][0].observe(0.004, 0.0)
    assert chosen(costs, request) == LIGHT


def test_a_busy_device_sends_instead_of_running_its_head(costs: Costs) -> None:
    """The light tap takes 4 ms of the device and 23 of the link, the head about 12 ms where nine in ten leave early."""
    costs.point_bytes[NARROW].value, costs.point_bytes[DEEP].value = 600, 0
    for share in costs.exit_share:
        share.value = 0.9
    request = InferenceRequest((0,), (NARROW, DEEP), forced_split=False, no_exit=None)
    assert chosen(costs, request) is None
    for _ in range(10):
        costs.encode_s[0][0].observe(4 * 0.004, 0.0)
    assert chosen(costs, request) == NARROW


def test_quality_leaves_out_rates_and_widths_that_are_not_good_enough(tiny_bundle: Bundle, costs: Costs) -> None:
    """Agreement is 0.93 + 0.02 a width + 0.01 a rate."""
    config = EdgeConfig(tiny_bundle.folder, min_agreement=0.96)
    request = resolve_request(costs.points, tiny_bundle.manifest, config, None, Overrides())
    assert names(costs.routes(2, LINK, request))[1:] == [
        OperatingPoint(0, 0, 2),
        OperatingPoint(0, 1, 1),
        OperatingPoint(0, 1, 2),
        OperatingPoint(1, 0, 1),
    ]
