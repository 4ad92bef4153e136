"""Which token sessions keep their state in memory. Pure: sizes and times come in, names to evict go out.

A context is a cache: the device keeps the accepted tokens and can always bring them again. Knows nothing about tensors.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

SessionId = bytes


@dataclass(slots=True)
class HeldState:
    """One session's state: its size, when it was last used (monotonic seconds), whether a device is connected to it."""

    size_bytes: int
    used_s: float
    attached: bool


class KVBudget:
    """A ledger with a budget in bytes. It never says more is held than the budget allows."""

    def __init__(self, budget_bytes: int, idle_s: float) -> None:
        self.budget_bytes = budget_bytes
        self._idle_s = idle_s
        self.held_bytes = 0
        self._held: dict[SessionId, HeldState] = {}

    def __len__(self) -> int:
        return len(self._held)

    def record(self, session: SessionId, size_bytes: int, now_s: float, *, attached: bool) -> None:
        """A session was used and has this size now."""
        self.held_bytes += size_bytes - self._size(session)
        self._held[session] = HeldState(size_bytes, now_s, attached)

    def detach(self, session: SessionId, now_s: float) -> None:
        """Its device has gone; what is held of it stays for now."""
        self.record(session, self._size(session), now_s, attached=False)

    def drop(self, session: SessionId) -> None:
        """A session's state is gone; unknown ones are not an error."""
        self.held_bytes -= self._size(session)
        self._held.pop(session, None)

    def idle(self, now_s: float) -> list[SessionId]:
        """Sessions that no device is connected to and that nobody used for `idle_s`."""
        return [name for name, held in self._held.items() if not held.attached and now_s - held.used_s >= self._idle_s]

    def stalest(self) -> SessionId | None:
        """The longest unused session that no device is connected to."""
        detached = [(held.used_s, name) for name, held in self._held.items() if not held.attached]
        return min(detached)[1] if detached else None

    def victims(self, session: SessionId, size_bytes: int, keep: Collection[SessionId]) -> list[SessionId] | None:
        """Whom to evict so that `session` may have `size_bytes`: the unconnected first, then the least recently used.

        Those in `keep` stay. None when it would not fit even so.
        """
        missing = self.held_bytes - self._size(session) + size_bytes - self.budget_bytes
        if missing <= 0:
            return []
        order = sorted(self._held.items(), key=lambda item: (item[1].attached, item[1].used_s))
        chosen = []
        for name, held in order:
            if missing <= 0:
                break
            if held.size_bytes and name != session and name not in keep:
                chosen.append(name)
                missing -= held.size_bytes
        return chosen if missing <= 0 else None

    def _size(self, session: SessionId) -> int:
        return self._held[session].size_bytes if session in self._held else 0
