"""Clouds and whether they answer, in words for people."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import click

from isthmus.edge_agent.policy.breaker import WORDS, State


class Cloud(Protocol):
    """A link, as far as it is described."""

    target: str

    @property
    def state(self) -> State: ...

    @property
    def refusal(self) -> str | None: ...


def describe_clouds(links: Iterable[Cloud]) -> str:
    """`cloud cloud:50051 connected`, for each; `no cloud` for none."""
    words = {**WORDS, "half_open": "answering"}  # at the start, not again
    return ", ".join(f"cloud {link.target} {words[link.state]}" for link in links) or "no cloud"


def warn_of(links: Iterable[Cloud]) -> None:
    """A line for each cloud that cannot be used, with what is known of it."""
    for link in links:
        if link.state == "open" and link.refusal is not None:
            click.echo(f"warning: cloud {link.target}: {link.refusal}", err=True)
