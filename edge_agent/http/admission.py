"""Admission slots: how many requests an API works on at once, running and waiting; above it they are refused."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from isthmus.models.errors import Overloaded


class AdmissionSlots:
    """`limit` slots for requests whose body has arrived."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._held = 0

    def check(self) -> None:
        """Raises Overloaded when all are held, so that no body is read in vain."""
        if self._held >= self._limit:
            raise Overloaded(f"the agent is at its limit of {self._limit} concurrent requests; try again later")

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Hold a slot. Raises Overloaded when all are held."""
        self.check()
        self._held += 1
        try:
            yield
        finally:
            self._held -= 1
