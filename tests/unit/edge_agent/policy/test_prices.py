from __future__ import annotations

import pytest

from isthmus.edge_agent.policy.prices import PRESETS, Energy, Objective, Prices


def test_prices_add_up() -> None:
    assert Prices(1e-9, 0.5, 0.25).usd(up_bytes=1000, cloud_s=2, device_s=4) == pytest.approx(1e-6 + 1 + 1)


def test_by_default_the_devices_own_time_is_free() -> None:
    assert Prices().usd(up_bytes=0, cloud_s=0, device_s=3600) == 0.0
    assert Prices().usd(up_bytes=1e9, cloud_s=3600, device_s=0) == pytest.approx(0.50 + 0.05)


def test_tails_of_messages_that_follow_each_other_overlap() -> None:
    energy = Energy(compute_w=5, idle_w=1, up_j_per_byte=1e-6, down_j_per_byte=2e-6, tail_s=10, tail_w=0.5)
    assert energy.radio_j(1000, 500, since_s=float("inf")) == pytest.approx(0.001 + 0.001 + 5)
    assert energy.radio_j(1000, 500, since_s=2) == pytest.approx(0.001 + 0.001 + 1)
    assert energy.radio_j(0, 0, since_s=-1) == 0


@pytest.mark.parametrize(
    ("objective", "better", "worse"),
    [
        ("fastest", (0.050, 9e-6, 9.0, 0.97), (0.053, 1e-6, 0.1, 0.98)),
        ("fastest", (0.051, 9e-6, 9.0, 0.98), (0.050, 1e-6, 0.1, 0.96)),
        ("cheapest", (5.0, 1.00e-6, 9.0, 0.97), (0.05, 1.03e-6, 0.1, 0.98)),
        ("cheapest", (0.05, 1.00e-6, 9.0, 0.97), (5.0, 1.00e-6, 0.1, 0.97)),
        ("greenest", (5.0, 9e-6, 0.100, 0.97), (0.05, 1e-6, 0.103, 0.98)),
        ("best", (5.0, 9e-6, 9.0, 0.98), (0.05, 1e-6, 0.1, 0.97)),
    ],
)
def test_each_objective_weighs_its_own_amount_and_quality_where_that_is_nearly_equal(
    objective: Objective, better: tuple[float, ...], worse: tuple[float, ...]
) -> None:
    weights = PRESETS[objective]
    assert weights.cost(*better) < weights.cost(*worse)
