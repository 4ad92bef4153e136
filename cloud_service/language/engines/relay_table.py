"""The sessions of a relay by name, and the bytes that they take; those without a device are forgotten first."""

from __future__ import annotations

import time

from isthmus.cloud_service.byte_budget import ByteBudget
from isthmus.cloud_service.language.engines.relay_session import RelaySession
from isthmus.cloud_service.language.session_table import SessionTable
from isthmus.cloud_service.language.sessions import IDLE_S, MAX_PEER_SESSIONS, MAX_SESSIONS
from isthmus.models.errors import Overloaded


class RelayTable(SessionTable[RelaySession]):
    """At most MAX_SESSIONS, MAX_PEER_SESSIONS of a peer, and what they take within `queue`."""

    def __init__(self, queue: ByteBudget) -> None:
        super().__init__(queue)
        self._resting: dict[bytes, float] = {}  # since when, oldest first

    def get(self, name: bytes) -> RelaySession | None:
        return self._by_name.get(name)

    def admit(self, session: RelaySession) -> None:
        """Hold a new session, in place of a former one of its name. Raises Overloaded."""
        self._forget_idle()
        former = self._by_name.get(session.name)
        if former is None or former.peer != session.peer:
            own = [name for name in self._resting if self._by_name[name].peer == session.peer]
            self._make_room(own, self._of_peer[session.peer] >= MAX_PEER_SESSIONS, f"{MAX_PEER_SESSIONS} of a peer")
        if former is None:
            self._make_room(list(self._resting), len(self._by_name) >= MAX_SESSIONS, f"{MAX_SESSIONS}")
        self._take(session)
        if former is not None:
            self._remove(former)
        self._by_name[session.name] = session
        self._of_peer[session.peer] += 1

    def rest(self, session: RelaySession) -> None:
        """Its device has left; its tokens stay for the next turn, until the room is needed."""
        if session in self:
            self._resting[session.name] = time.monotonic()
            self.settle(session)

    def _take(self, session: RelaySession) -> None:
        """Count a new session, in the place of resting ones where there is no room. Raises Overloaded."""
        while True:
            try:
                self._queue.take(session.own_bytes)
            except Overloaded:
                stalest = next((name for name in self._resting if name != session.name), None)
                if stalest is None:
                    raise
                self._remove(self._by_name[stalest])
            else:
                session.counted_bytes = session.own_bytes
                return

    def _make_room(self, resting: list[bytes], full: bool, limit: str) -> None:
        if full and not resting:
            raise Overloaded(f"{limit} sessions are open already")
        if full:
            self._remove(self._by_name[resting[0]])

    def _forget_idle(self) -> None:
        since_s = time.monotonic() - IDLE_S
        for name in [name for name, at_s in self._resting.items() if at_s < since_s]:
            self._remove(self._by_name[name])

    def _remove(self, session: RelaySession) -> None:
        del self._by_name[session.name]
        self._resting.pop(session.name, None)
        self.settle(session)
        self._of_peer[session.peer] -= 1
        if not self._of_peer[session.peer]:
            del self._of_peer[session.peer]
