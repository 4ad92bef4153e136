from __future__ import annotations

import pytest

from isthmus.edge_agent.policy.prices import Prices


def test_prices_add_up() -> None:
    assert Prices(1e-9, 0.5, 0.25).usd(up_bytes=1000, cloud_s=2, device_s=4) == pytest.approx(1e-6 + 1 + 1)


def test_by_default_the_devices_own_time_is_free() -> None:
    assert Prices().usd(up_bytes=0, cloud_s=0, device_s=3600) == 0.0
    assert Prices().usd(up_bytes=1e9, cloud_s=3600, device_s=0) == pytest.approx(0.50 + 0.05)
