"""What the endpoints of a language model share: the backend, limits, and the slots before it.

body -> admission slot -> parsed, few at a time -> running slot -> backend
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

from anyio import CapacityLimiter

from isthmus.edge_agent.http.admission import AdmissionSlots
from isthmus.edge_agent.http.uploads import Uploads
from isthmus.edge_agent.language.request import GenerationBackend
from isthmus.edge_agent.policy.arms import Arm

PARSED_AT_ONCE = 4
LARGE_BODY_BYTES = 64 << 10  # above it one body is parsed at a time: a tokenizer needs 400 bytes for each of its own


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of one server."""

    admitted: int = 32  # requests, running and waiting; above it 503
    running: int = 4  # of them in the backend at once by the device alone, and as many with a cloud
    body_bytes: int = 4 << 20  # above it 413
    held_bytes: int = 64 << 20  # of all bodies together; above it 503
    client_timeout_s: float = 30.0  # for a body to arrive; above it 408


DEFAULT_LIMITS = Limits()


class ApiState:
    """The backend and what limits its use."""

    def __init__(self, backend: GenerationBackend, limits: Limits) -> None:
        self.backend = backend
        self.slots = AdmissionSlots(limits.admitted)
        self.uploads = Uploads(limits.body_bytes, limits.held_bytes, limits.client_timeout_s)
        self.created = int(time.time())
        self._device, self._cloud = asyncio.Semaphore(limits.running), asyncio.Semaphore(limits.running)
        self.waiting = CapacityLimiter(limits.admitted)  # for the cloud's tokenizer: not at the cost of who parses
        self._large, self._small = CapacityLimiter(1), CapacityLimiter(PARSED_AT_ONCE)

    def running(self, arm: Arm) -> asyncio.Semaphore:
        """The running slots of an arm: answers that wait for their cloud do not hold those of the device."""
        return self._device if arm == "edge" else self._cloud

    def parsing(self, body_bytes: int) -> CapacityLimiter:
        """How many bodies of this size are parsed at once."""
        return self._large if body_bytes > LARGE_BODY_BYTES else self._small
