"""Handles one device's stream of openings and rounds. Knows messages as values, nothing about gRPC or protobuf."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from isthmus.cloud_service.language.engines.protocol import OpenSession, SessionHost
from isthmus.cloud_service.language.session import EventQueue
from isthmus.models.errors import InvalidInput
from isthmus.models.messages import Opening, Round

FindHost: TypeAlias = Callable[[bytes], SessionHost[Any]]  # by the first 8 bytes of its model's fingerprint


class GenerateHandler:
    """At most one session at a time. `events` holds what goes to the device; None follows the last event."""

    def __init__(self, find: FindHost, peer: str) -> None:
        """`find` raises UnknownBundle or EngineDown. `peer`: the connection of the stream."""
        self._find, self._peer = find, peer
        self._host: SessionHost[Any] | None = None
        self._session: OpenSession | None = None
        self._opening_seen = False  # whether it succeeded or not
        self.events = EventQueue()

    @property
    def busy(self) -> bool:
        """Whether a round has no reply yet."""
        return self._session is not None and self._session.busy

    def begin_opening(self) -> None:
        """An opening has arrived, valid or not: the former session is left."""
        self.leave()
        self._opening_seen = True

    async def handle(self, request: Opening | Round) -> None:
        """Open a session or queue a round. Raises InvalidInput, what `find` raises, and what the host raises.

        Rounds after an opening that failed are dropped: the error of the opening answers them all.
        """
        if isinstance(request, Opening):
            self._host = self._find(request.model)
            self._session = await self._host.open(request, self.events, self._peer)
        elif not self._opening_seen:
            raise InvalidInput("a round came before its session was opened")
        elif self._host is not None and self._session is not None:
            self._host.add(self._session, request)

    def end(self) -> None:
        """The device sends no more: None follows the events of outstanding rounds."""
        if self._host is not None and self._session is not None:
            self._host.end(self._session)
        else:
            self.events.put_nowait(None)

    def leave(self) -> None:
        """The device has disconnected, or opens another session."""
        if self._host is not None and self._session is not None:
            self._host.leave(self._session)
        self._session = None
