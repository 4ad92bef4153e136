"""Which sessions keep their KV cache in memory. Pure: sizes and times come in, names of sessions to evict go out.

An evicted cache loses no token: the device keeps the accepted ones and can send them again. Knows nothing of tensors.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

SessionId = bytes


@dataclass(frozen=True, slots=True)
class HeldState:
    """One session's cache: its size, when it was last used (monotonic seconds), whether a device is connected."""

    size_bytes: int
    used_s: float
    attached: bool


class KVBudget:
    """A ledger of cache sizes within a budget in bytes. Evict the `victims` first, then `record`."""

    def __init__(self, budget_bytes: int, idle_s: float) -> None:
        """`idle_s`: how long a cache is kept that no device is connected to."""
        self.budget_bytes = budget_bytes
        self._idle_s = idle_s
        self.held_bytes = 0
        self._held: dict[SessionId, HeldState] = {}

    def __len__(self) -> int:
        return len(self._held)

    def copy(self) -> KVBudget:
        """A ledger with the same entries, to plan with."""
        other = KVBudget(self.budget_bytes, self._idle_s)
        other.held_bytes, other._held = self.held_bytes, dict(self._held)
        return other

    def record(self, session: SessionId, size_bytes: int, now_s: float, *, attached: bool) -> None:
        """A session was used at `now_s` and has this size."""
        self.held_bytes += size_bytes - self._size(session)
        self._held[session] = HeldState(size_bytes, now_s, attached)

    def detach(self, session: SessionId, now_s: float) -> None:
        """The session's device has disconnected; its cache stays for now."""
        self.record(session, self._size(session), now_s, attached=False)

    def drop(self, session: SessionId) -> None:
        """A session's cache is gone. Unknown sessions are no error."""
        self.held_bytes -= self._size(session)
        self._held.pop(session, None)

    def idle(self, now_s: float) -> list[SessionId]:
        """Sessions that no device is connected to and that have not been used for `idle_s`."""
        return [name for name, held in self._held.items() if not held.attached and now_s - held.used_s >= self._idle_s]

    def stalest(self, names: Collection[SessionId]) -> SessionId | None:
        """Of `names` the least recently used session that no device is connected to."""
        detached = [(held.used_s, name) for name in names if (held := self._held.get(name)) and not held.attached]
        return min(detached)[1] if detached else None

    def victims(
        self, session: SessionId, size_bytes: int, keep: Collection[SessionId], late: Sequence[SessionId] = ()
    ) -> list[SessionId] | None:
        """Sessions to evict so that `session` can have `size_bytes`: those without a device first, then by last use.

        Sessions in `keep` stay; those in `late` go after all others, the last of them first. None when there is no
        room even so.
        """
        missing = self.held_bytes - self._size(session) + size_bytes - self.budget_bytes
        if missing <= 0:
            return []
        places = {name: -place for place, name in enumerate(late, start=1)}
        order = sorted(
            self._held.items(),
            key=lambda item: (item[0] in places, places.get(item[0], 0), item[1].attached, item[1].used_s),
        )
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
