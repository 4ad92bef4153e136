from __future__ import annotations

import pytest

from edge_agent.config import EdgeConfig
from edge_agent.costs import Costs
from edge_agent.policy.estimates import LinkEstimate
from edge_agent.policy.plan import Prices
from models.bundle import Bundle
from models.manifest import Manifest
from protos.limits import MAX_FRAMING_BYTES

LINK = LinkEstimate(rtt_s=0.1, bytes_per_s=1000)


def with_agreement(manifest: Manifest, *agreement: float) -> Manifest:
    rates = tuple(
        rate.model_copy(update={"agreement": value})
        for rate, value in zip(manifest.bottleneck.rates, agreement, strict=True)
    )
    return manifest.model_copy(update={"bottleneck": manifest.bottleneck.model_copy(update={"rates": rates})})


@pytest.fixture
def costs(tiny_bundle: Bundle) -> Costs:
    config = EdgeConfig(tiny_bundle.folder, prices=Prices(1e-6, 1e-3, 1e-4), min_agreement=0.0)
    made = Costs(tiny_bundle.manifest, config)
    made.cloud_s_per_mac.value = 0.0
    made.segment_s[0].value, made.segment_s[1].value, made.encode_s.value = 0.010, 0.020, 0.003
    made.image_encode_s.value, made.image_bytes.value = 0.005, 2000
    for average, size in zip(made.rate_bytes, (100, 400), strict=True):
        average.value = size
    return made


@pytest.mark.parametrize(
    ("agreement", "wanted", "rates"),
    [((0.9, 0.97), 0.95, [1]), ((0.96, 0.97), 0.95, [0, 1]), ((0.8, 0.7), 0.95, [0]), ((0.7, 0.8), 0.95, [1])],
)
def test_rates_meet_the_owners_quality_or_come_nearest(
    tiny_bundle: Bundle, agreement: tuple[float, float], wanted: float, rates: list[int]
) -> None:
    manifest = with_agreement(tiny_bundle.manifest, *agreement)
    assert Costs(manifest, EdgeConfig(tiny_bundle.folder, min_agreement=wanted)).rates == rates


def test_a_split_costs_encoder_link_and_framing(costs: Costs) -> None:
    option = costs.split(1, LINK)
    up_bytes = 400 + MAX_FRAMING_BYTES
    assert option.seconds == pytest.approx(0.003 + 0.1 + up_bytes / 1000)
    assert option.usd == pytest.approx(up_bytes * 1e-6 + 0.003 * 1e-4)
    assert (option.route, option.rate) == ("split", 1)


def test_a_whole_image_costs_its_bytes(costs: Costs) -> None:
    assert costs.offload(LINK).seconds == pytest.approx(0.005 + 0.1 + (2000 + MAX_FRAMING_BYTES) / 1000)


def test_the_cloud_is_charged_by_its_operations(costs: Costs, tiny_bundle: Bundle) -> None:
    before = costs.split(0, LINK).usd
    costs.cloud_s_per_mac.value = 1e-9
    assert costs.split(0, LINK).usd - before == pytest.approx(tiny_bundle.manifest.tail_macs * 1e-9 * 1e-3)


def test_options_before_between_and_behind_the_exits(costs: Costs) -> None:
    routes = [[option.route for option in costs.options(passed, LINK)] for passed in range(3)]
    assert routes == [["offload", "continue"], ["offload", "continue"], ["offload", "split", "split"]]


def test_without_a_link_there_is_only_the_head(costs: Costs) -> None:
    assert [[option.route for option in costs.options(passed, None)] for passed in range(3)] == [
        ["continue"],
        ["continue"],
        [],
    ]


def test_running_on_counts_on_the_exit_to_answer_its_share(costs: Costs) -> None:
    costs.exit_share[1].value = 0.25
    behind_s = min(option.seconds for option in costs.options(2, LINK))
    assert costs.run_on(1, LINK).seconds == pytest.approx(0.020 + 0.75 * behind_s)
