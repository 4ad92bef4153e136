"""A few symbols as one integer, the initial state of an rANS coder. Exact arithmetic coding in Python integers.

An rANS coder whose state starts at zero wastes almost all the precision of its first symbol, three bytes with 24 bits;
one that starts from a number of that size wastes nothing. The symbols' interval of [0, 1) is identified by the shortest
bit string that lies in it, and bit strings are numbered by length: 0 for the empty one, 1 and 2 for those of one bit,
3 to 6 for those of two, …

Source: Rissanen and Langdon, "Arithmetic coding" (IBM J. Res. Dev. 1979), without the rounding.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

BITS = 16  # frequencies add up to 2**16

Starts = Sequence[int]  # cumulative frequencies of a table, from 0 to 2**16


def seed_of(symbols: Sequence[int], tables: Sequence[Starts]) -> int:
    """The number that represents symbols, each coded with the table at the same index."""
    low, width = 0, 1
    for symbol, starts in zip(symbols, tables, strict=True):
        start = starts[symbol]
        low = (low << BITS) + width * start
        width *= starts[symbol + 1] - start
    return number_of(low, width, BITS * len(symbols))


def symbols_of(seed: int, tables: Sequence[Starts]) -> list[int]:
    """The inverse of `seed_of`. Raises ValueError when the number represents no symbols of these tables."""
    total = BITS * len(tables)
    bits = (seed + 1).bit_length() - 1
    if bits > total:
        raise ValueError(f"{bits} bits for {len(tables)} symbols")
    point = rest = (seed + 1 - (1 << bits)) << (total - bits)
    symbols, width, scale = [], 1, total
    for starts in tables:
        scale -= BITS
        unit = width << scale
        symbol = bisect_right(starts, rest // unit) - 1
        symbols.append(symbol)
        rest -= starts[symbol] * unit
        width *= starts[symbol + 1] - starts[symbol]
    if number_of(point - rest, width, total) != seed:
        raise ValueError("not the shortest bit string of these symbols")
    return symbols


def number_of(low: int, width: int, total: int) -> int:
    """The number of the shortest bit string that identifies a point of [low, low + width) / 2**total."""
    spare = ((low - 1) ^ (low + width - 1)).bit_length() - 1 if low else total
    return (1 << (total - spare)) - 1 - (-low >> spare)
