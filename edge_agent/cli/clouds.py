"""Clouds and whether they answer, in words for people."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from isthmus.edge_agent.policy.breaker import WORDS, State


class Cloud(Protocol):
    """A link, as far as it is described."""

    target: str

    @property
    def state(self) -> State: ...


def describe_clouds(links: Iterable[Cloud]) -> str:
    """`cloud cloud:50051 connected`, for each; `no cloud` for none."""
    return ", ".join(f"cloud {link.target} {WORDS[link.state]}" for link in links) or "no cloud"
