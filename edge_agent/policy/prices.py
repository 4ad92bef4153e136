"""Prices of an answer, and the objective to minimise. Used by both wings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from isthmus.models.settings import Flag

Objective = Literal["fastest", "cheapest"]


@dataclass(frozen=True, slots=True)
class Prices:
    """US dollars. The defaults are an IoT data plan, a small cloud CPU, and a device whose time is free."""

    up_usd_per_byte: Annotated[
        float, Field(ge=0, description="Price of the uplink, US dollars a gigabyte."), Flag("usd_per_gb", 1e9)
    ] = 0.50 / 1e9
    cloud_usd_per_s: Annotated[
        float, Field(ge=0, description="Price of the cloud, US dollars an hour."), Flag("usd_per_cloud_hour", 3600)
    ] = 0.05 / 3600
    device_usd_per_s: float = 0.0

    def usd(self, up_bytes: float, cloud_s: float, device_s: float) -> float:
        """Dollars for `up_bytes` sent, and seconds of computation on each side."""
        return up_bytes * self.up_usd_per_byte + cloud_s * self.cloud_usd_per_s + device_s * self.device_usd_per_s
