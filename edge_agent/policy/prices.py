"""What an answer costs in money and modelled energy, and the objective to minimise. Used by both wings. Pure.

Energy is a model, never a measurement: powers and energies per bit of a profile, times seconds and bytes.

    joules  =  compute_w * seconds of computation  +  idle_w * seconds of waiting
            +  joules per byte * bytes  +  tail_w * what the radio stays awake for because of this message
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

from pydantic import Field

from isthmus.models.settings import Flag

Objective = Literal["fastest", "cheapest", "greenest", "best"]
UP_USD_PER_BYTE, CLOUD_USD_PER_S = 0.50 / 1e9, 0.05 / 3600  # an IoT data plan, a small cloud CPU


@dataclass(frozen=True, slots=True)
class Prices:
    """US dollars; of None, an IoT data plan and a small cloud CPU. The device's time is free."""

    up_usd_per_byte: Annotated[
        float | None,
        Field(ge=0, description="Price of the uplink, US dollars a gigabyte. Without it: the profile's."),
        Flag("usd_per_gb", 1e9),
    ] = None
    cloud_usd_per_s: Annotated[
        float | None,
        Field(ge=0, description="Price of the cloud, US dollars an hour. Without it: the profile's."),
        Flag("usd_per_cloud_hour", 3600),
    ] = None
    device_usd_per_s: float = 0.0
    down_usd_per_byte: float = 0.0
    usd_per_token: float = 0.0  # that a cloud's engine decodes

    def usd(self, up_bytes: float, cloud_s: float, device_s: float, down_bytes: float = 0.0) -> float:
        """Dollars for bytes sent and received, and seconds of computation on each side."""
        up = UP_USD_PER_BYTE if self.up_usd_per_byte is None else self.up_usd_per_byte
        cloud = CLOUD_USD_PER_S if self.cloud_usd_per_s is None else self.cloud_usd_per_s
        return up_bytes * up + cloud_s * cloud + device_s * self.device_usd_per_s + down_bytes * self.down_usd_per_byte


@dataclass(frozen=True, slots=True)
class Energy:
    """A model of the device: watts while it computes and while it waits, joules a byte, and the radio's tail."""

    compute_w: float
    idle_w: float
    up_j_per_byte: float
    down_j_per_byte: float
    tail_s: float  # that the radio stays awake after a message
    tail_w: float

    def radio_j(self, up_bytes: float, down_bytes: float, since_s: float) -> float:
        """Modelled joules of a message and its reply, `since_s` after the last one: their tails overlap."""
        tail_j = self.tail_w * min(max(since_s, 0.0), self.tail_s)
        return up_bytes * self.up_j_per_byte + down_bytes * self.down_j_per_byte + tail_j


@dataclass(frozen=True, slots=True)
class CostProfile:
    """Prices and energy of a device on its link, by the name of the profile that they come from."""

    name: str
    prices: Prices
    energy: Energy


class Weights(NamedTuple):
    """What a second, a dollar, a modelled joule, and the whole of the agreement with the cloud are worth: one scale.

    `quality`: a point of agreement is worth a hundredth of it.
    """

    seconds: float
    usd: float
    joules: float
    quality: float

    def cost(self, seconds: float, usd: float, joules: float, agreement: float) -> float:
        """What to minimise."""
        return self.seconds * seconds + self.usd * usd + self.joules * joules + self.quality * (1.0 - agreement)


# Each objective's own weight decides, unless it is nearly equal: then quality does, at this rate, and at last speed.
PRESETS: dict[Objective, Weights] = {
    "fastest": Weights(seconds=1.0, usd=0.0, joules=0.0, quality=0.2),  # a point of agreement for 2 ms
    "cheapest": Weights(seconds=1e-9, usd=1.0, joules=0.0, quality=2e-6),  # a point for 0.02 µ$
    "greenest": Weights(seconds=1e-6, usd=0.0, joules=1.0, quality=0.1),  # a point for a modelled mJ
    "best": Weights(seconds=1e-3, usd=1e-3, joules=1e-6, quality=1.0),  # a point for 10 s
}
