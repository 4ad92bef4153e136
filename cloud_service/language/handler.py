"""Handles one device's stream of openings and rounds. Knows messages as values, nothing about gRPC or protobuf."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from isthmus.cloud_service.language.engines.protocol import OpenSession, SessionHost
from isthmus.cloud_service.language.session import EventQueue
from isthmus.models.errors import InvalidInput, Overloaded
from isthmus.models.messages import Opening, Round

SESSION_RETRY_S = 1.0  # another answer of the device may be over by then
FindHost: TypeAlias = Callable[[bytes], SessionHost[Any]]  # by the first 8 bytes of its model's fingerprint


class GenerateHandler:
    """At most one session at a time. `events` holds what goes to the device; None follows the last event."""

    def __init__(self, find: FindHost, peer: str, session_bytes: int | None = None) -> None:
        """`find` raises UnknownBundle or EngineDown. `peer`: whose stream it is.

        session_bytes: of KV caches that the sessions of `peer` may hold; None for no limit.
        """
        self._find, self._peer, self._session_bytes = find, peer, session_bytes
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
            await self._keep_within()
        elif not self._opening_seen:
            raise InvalidInput("a round came before its session was opened")
        elif self._host is not None and self._session is not None:
            await self._keep_within()
            self._host.add(self._session, request)

    async def _keep_within(self) -> None:
        """Raises Overloaded, and leaves the session, where this peer's sessions hold more than they may."""
        limit = self._session_bytes
        if limit is None or self._host is None or await self._host.keep_within(self._peer, limit):
            return
        self.leave()
        await self._host.keep_within(self._peer, limit)
        raise Overloaded(f"the sessions of this device need more than the {limit} bytes of its quota", SESSION_RETRY_S)

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
