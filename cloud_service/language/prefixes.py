"""Which sessions hold the keys and values of a text's beginning, so that another with the same beginning copies them.

    text  t0 .. t15 | t16 .. t31 | t32 ..     a key of each whole block: of the key before it and of its tokens
                                              key -> sessions that hold the state of all tokens up to there

Pure. A key may be that of another text too: whoever copies compares the tokens.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from itertools import count

BLOCK_TOKENS = 16  # a shorter beginning is not looked up: it says nothing of what others have sent, token by token


class Prefixes:
    """Blocks of texts whose state is held, by session. `scope`: sessions of different ones share nothing."""

    def __init__(self) -> None:
        self._holders: dict[int, dict[bytes, None]] = {}
        self._keys: dict[bytes, list[int]] = {}

    def record(self, session: bytes, scope: Hashable, tokens: Sequence[int], held: int) -> None:
        """The session holds the state of the first `held` of its `tokens`, of which there were fewer before."""
        keys = self._keys.setdefault(session, [])
        for start in range(len(keys) * BLOCK_TOKENS, held - BLOCK_TOKENS + 1, BLOCK_TOKENS):
            keys.append(next_key(keys[-1] if keys else hash(scope), tokens, start))
            self._holders.setdefault(keys[-1], {})[session] = None

    def drop(self, session: bytes) -> None:
        """The session holds nothing any more. Unknown ones are no error."""
        for key in self._keys.pop(session, ()):
            holders = self._holders[key]
            del holders[session]
            if not holders:
                del self._holders[key]

    def find(self, scope: Hashable, tokens: Sequence[int]) -> Iterator[tuple[bytes, int]]:
        """Sessions that may hold the state of the first tokens, and of how many: one a length, the longest first."""
        key, found = hash(scope), list[tuple[bytes, int]]()
        for place in count():
            stop = (place + 1) * BLOCK_TOKENS
            if stop > len(tokens):
                break
            key = next_key(key, tokens, place * BLOCK_TOKENS)
            if key not in self._holders:
                break
            found.append((next(reversed(self._holders[key])), stop))
        return reversed(found)


def next_key(before: int, tokens: Sequence[int], start: int) -> int:
    """The key of the block from `start` on, after the block of the key `before`."""
    return hash((before, *tokens[start : start + BLOCK_TOKENS]))
