"""Places are shared fairly, and none is lost whatever becomes of who waits."""

from __future__ import annotations

import asyncio

import pytest

from isthmus.cloud_service.language.engines.places import Places
from isthmus.models.errors import Overloaded
from tests.unit.cloud_service.language.engines.relayed import play


async def wait_of(places: Places, peer: str, order: list[str]) -> None:
    await places.take(peer)
    order.append(peer)


def test_a_free_place_goes_to_the_peer_with_the_fewest() -> None:
    async def scenario() -> None:
        places, order = Places(3, 5.0), list[str]()
        for peer in ("a", "a", "b"):
            await places.take(peer)
        waiting = [asyncio.create_task(wait_of(places, peer, order)) for peer in ("a", "a", "b", "c")]
        await asyncio.sleep(0)
        for peer in ("a", "b", "a", "c"):
            places.free(peer)
            await asyncio.sleep(0)
        await asyncio.gather(*waiting)
        assert order == ["c", "b", "a", "a"]

    play(scenario)


@pytest.mark.parametrize("given", [False, True])
def test_who_gives_up_leaves_no_place_taken(given: bool) -> None:
    async def scenario() -> None:
        places = Places(1, 5.0)
        await places.take("a")
        waiting = asyncio.create_task(places.take("b"))
        await asyncio.sleep(0)
        if given:
            places.free("a")  # and cancelled before it runs again
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        if not given:
            places.free("a")
        await asyncio.wait_for(places.take("c"), 1)

    play(scenario)


def test_a_wait_is_bounded() -> None:
    async def scenario() -> None:
        places = Places(1, 0.01)
        await places.take("a")
        with pytest.raises(Overloaded, match="works on 1 requests"):
            await places.take("b")

    play(scenario)
