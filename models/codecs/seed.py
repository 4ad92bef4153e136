"""A few symbols as one whole number that an rANS coder can start from. Exact arithmetic coding in Python integers.

An rANS coder that starts from zero wastes almost all the precision of its first symbol, three bytes with 24 bits; one
that starts from a number of that size wastes nothing. The symbols' interval of [0, 1) is named by the fewest bits that
lie in it, and these, of any number, by a whole number: 0 for none, 1 and 2 for one, 3 to 6 for two, …

Source: Rissanen and Langdon, "Arithmetic coding" (IBM J. Res. Dev. 1979), without the rounding.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

BITS = 16  # frequencies add up to 2**16

Starts = Sequence[int]  # cumulative frequencies of a table, from 0 to 2**16


def seed_of(symbols: Sequence[int], tables: Sequence[Starts]) -> int:
    """The number that stands for symbols, each of the table beside it."""
    low, width = 0, 1
    for symbol, starts in zip(symbols, tables, strict=True):
        start = starts[symbol]
        low = (low << BITS) + width * start
        width *= starts[symbol + 1] - start
    return name_of(low, width, BITS * len(symbols))


def symbols_of(seed: int, tables: Sequence[Starts]) -> list[int]:
    """The inverse of `seed_of`. Raises ValueError when the number stands for no symbols of these tables."""
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
    if name_of(point - rest, width, total) != seed:
        raise ValueError("not the fewest bits that stand for these symbols")
    return symbols


def name_of(low: int, width: int, total: int) -> int:
    """The number of the fewest bits that name a point of [low, low + width) / 2**total."""
    spare = ((low - 1) ^ (low + width - 1)).bit_length() - 1 if low else total
    return (1 << (total - spare)) - 1 - (-low >> spare)
