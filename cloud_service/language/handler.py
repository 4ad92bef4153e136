"""Handles one device's stream of openings and rounds. Knows messages as values, nothing about gRPC or protobuf."""

from __future__ import annotations

from collections.abc import Mapping

from isthmus.cloud_service.language.engines.native import LanguageEngine
from isthmus.cloud_service.language.session import EventQueue, Session
from isthmus.models.errors import InvalidInput, UnknownBundle
from isthmus.models.messages import Opening, Round


class GenerateHandler:
    """At most one session at a time. `events` holds what goes to the device; None follows the last event."""

    def __init__(self, engines: Mapping[bytes, LanguageEngine], peer: str) -> None:
        """`engines` by the first 8 bytes of their model's fingerprint. `peer`: the connection of the stream."""
        self._engines, self._peer = engines, peer
        self._engine: LanguageEngine | None = None
        self._session: Session | None = None
        self._opening_seen = False  # whether it succeeded or not
        self.events = EventQueue()

    @property
    def busy(self) -> bool:
        """Whether a round has no reply yet."""
        session = self._session
        return session is not None and (bool(session.rounds) or session.sequence.scheduled is not None)

    def begin_opening(self) -> None:
        """An opening has arrived, valid or not: the former session is left."""
        self.leave()
        self._opening_seen = True

    async def handle(self, request: Opening | Round) -> None:
        """Open a session or queue a round. Raises UnknownBundle, InvalidInput, and what the engine raises.

        Rounds after an opening that failed are dropped: the error of the opening answers them all.
        """
        if isinstance(request, Opening):
            self._engine = self._engines.get(request.model)
            if self._engine is None:
                held = ", ".join(sorted(key.hex() for key in self._engines)) or "none"
                raise UnknownBundle(f"model {request.model.hex()} is not held here, there is {held}")
            self._session = await self._engine.open(request, self.events, self._peer)
        elif not self._opening_seen:
            raise InvalidInput("a round came before its session was opened")
        elif self._engine is not None and self._session is not None:
            self._engine.add(self._session, request)

    def end(self) -> None:
        """The device sends no more: None follows the events of outstanding rounds."""
        if self._engine is not None and self._session is not None:
            self._engine.end(self._session)
        else:
            self.events.put_nowait(None)

    def leave(self) -> None:
        """The device has disconnected, or opens another session."""
        if self._engine is not None and self._session is not None:
            self._engine.leave(self._session)
        self._session = None
