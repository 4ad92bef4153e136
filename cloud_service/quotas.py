"""How much each device may use: requests, bytes and tokens a second. Pure: times come in as values.

level  grows by `rate` a second up to BURST_S seconds' worth, falls by what is used, below zero too
> 0    the next request is taken; so a large one is never refused for ever, and the average holds
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field
from pydantic.dataclasses import dataclass as checked

from isthmus.models.errors import Overloaded
from isthmus.models.settings import Settings

BURST_S = 2.0
MAX_DEVICES = 10_000  # whose levels are kept; those that are full again need not be

Rate = Annotated[float, Field(gt=0)]


@checked(frozen=True)
class Quota(Settings):
    """What one device may use; None for as much as it likes."""

    requests_per_s: Annotated[Rate | None, Field(description="Photos and prompts a second.")] = None
    bytes_per_s: Annotated[Rate | None, Field(description="Bytes a second that the device sends.")] = None
    tokens_per_s: Annotated[Rate | None, Field(description="Tokens a second, of prompts and of answers.")] = None
    session_mb: Annotated[Rate | None, Field(description="Mebibytes of KV caches that its sessions hold.")] = None

    @property
    def session_bytes(self) -> int | None:
        return None if self.session_mb is None else int(self.session_mb * (1 << 20))


@dataclass(frozen=True, slots=True)
class Usage:
    """What a message uses, or has used."""

    requests: int = 0
    bytes: int = 0
    tokens: int = 0


@dataclass(slots=True)
class Levels:
    """What a device has left now."""

    requests: float
    bytes: float
    tokens: float
    at_s: float


class Quotas:
    """The levels of all devices. Used on one thread."""

    def __init__(self) -> None:
        self._levels: dict[str, Levels] = {}

    def take(self, peer: str, quota: Quota, usage: Usage, now_s: float, *, used: bool = False) -> None:
        """Count `usage`. Raises Overloaded, and counts nothing, where a level is used up; not for what is `used`."""
        if quota.requests_per_s is None and quota.bytes_per_s is None and quota.tokens_per_s is None:
            return
        levels = self._refilled(peer, quota, now_s)
        if not used:
            for kind, rate in rates(quota):
                if (level := getattr(levels, kind)) <= 0:
                    text = f"this device's quota of {rate:g} {kind} a second is used up"
                    raise Overloaded(text, 0.001 - level / rate)
        for kind, _ in rates(quota):
            setattr(levels, kind, getattr(levels, kind) - getattr(usage, kind))

    def _refilled(self, peer: str, quota: Quota, now_s: float) -> Levels:
        full = {kind: rate * BURST_S for kind, rate in rates(quota)}
        levels = self._levels.get(peer)
        if levels is None:
            self._forget_full(now_s)
            levels = self._levels[peer] = Levels(
                full.get("requests", 0.0), full.get("bytes", 0.0), full.get("tokens", 0.0), now_s
            )
        elapsed_s, levels.at_s = now_s - levels.at_s, now_s
        for kind, rate in rates(quota):
            setattr(levels, kind, min(getattr(levels, kind) + rate * elapsed_s, full[kind]))
        return levels

    def _forget_full(self, now_s: float) -> None:
        """Drop devices that were quiet for long, where there are too many."""
        if len(self._levels) >= MAX_DEVICES:
            self._levels = {name: each for name, each in self._levels.items() if now_s - each.at_s < 60 * BURST_S}


def rates(quota: Quota) -> list[tuple[str, float]]:
    """Kinds that are limited, with what a second brings."""
    pairs = (("requests", quota.requests_per_s), ("bytes", quota.bytes_per_s), ("tokens", quota.tokens_per_s))
    return [(kind, rate) for kind, rate in pairs if rate is not None]
