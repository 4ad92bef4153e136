"""One bound on the bytes that wait anywhere in the service: payloads, answers, texts of sessions, hidden states. Pure.

Used on the event loop's thread only, so it needs no lock.
"""

from __future__ import annotations

from isthmus.models.errors import Overloaded


class ByteBudget:
    """Bytes that are held now, at most `limit_bytes`. Whoever takes some gives them back."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.held_bytes = 0

    def take(self, size_bytes: int) -> None:
        """Hold `size_bytes` more. Raises Overloaded, and holds nothing more, where they do not fit."""
        if self.held_bytes + size_bytes > self.limit_bytes:
            raise Overloaded(
                f"{size_bytes} bytes do not fit: {self.held_bytes} of the {self.limit_bytes} bytes "
                "that may wait in this service are taken"
            )
        self.held_bytes += size_bytes

    def give(self, size_bytes: int) -> None:
        """Hold `size_bytes` less."""
        self.held_bytes -= size_bytes
