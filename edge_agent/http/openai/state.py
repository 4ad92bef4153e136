"""What the endpoints of a language model share: the backend, limits, and admission."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from isthmus.edge_agent.http.openai.errors import ApiError
from isthmus.edge_agent.language.request import GenerationBackend


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of one server."""

    admitted: int = 32  # requests, running and waiting; above it 503
    running: int = 4  # of them in the backend at once; each holds a KV cache and uses every core
    body_bytes: int = 4 << 20  # above it 413


DEFAULT_LIMITS = Limits()


class ApiState:
    """The backend and the admission slots before it. Admitted requests wait for one of the `running_slots`."""

    def __init__(self, backend: GenerationBackend, limits: Limits) -> None:
        self.backend = backend
        self.limits = limits
        self.running_slots = asyncio.Semaphore(limits.running)
        self.created = int(time.time())
        self._admitted = 0

    @contextmanager
    def admit(self) -> Iterator[None]:
        """Hold an admission slot. Raises ApiError 503 when all are in use."""
        if self._admitted >= self.limits.admitted:
            message = f"the agent is at its limit of {self.limits.admitted} concurrent requests; try again later"
            raise ApiError(503, message, type="overloaded", code="overloaded")
        self._admitted += 1
        try:
            yield
        finally:
            self._admitted -= 1
