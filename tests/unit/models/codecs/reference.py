"""The contextual codec's decoder once more, in plain integers, one place at a time, from the tables alone."""

from __future__ import annotations

from bisect import bisect_right
from fractions import Fraction
from itertools import accumulate, pairwise

import numpy as np

from isthmus.models.codecs.context_model import Integers
from isthmus.models.codecs.tables import Tables

QUANTILE_BITS = 24


class Rans:
    """64-bit state, 32-bit words read from the end of the number, 24-bit quantiles."""

    def __init__(self, number: int) -> None:
        self.words = [number >> shift & 0xFFFFFFFF for shift in range(0, number.bit_length(), 32)]
        self.state = 0
        for _ in range(min(2, len(self.words))):
            self.state = self.state << 32 | self.words.pop()

    def pop(self, frequencies: list[int]) -> int:
        """The next symbol of a table of 16-bit frequencies."""
        starts = [0, *accumulate(f << 8 for f in frequencies)]
        quantile = self.state & ((1 << QUANTILE_BITS) - 1)
        symbol = bisect_right(starts, quantile) - 1
        self.state = (self.state >> QUANTILE_BITS) * (frequencies[symbol] << 8) + quantile - starts[symbol]
        if self.state < 1 << 32 and self.words:
            self.state = self.state << 32 | self.words.pop()
        return symbol

    def rest(self) -> int:
        """What has not been read."""
        return sum(word << 32 * index for index, word in enumerate([*self.words, self.state]))


def seeded_symbols(seed: int, tables: list[list[int]]) -> list[int]:
    """Arithmetic decoding of a point in [0, 1) in fractions."""
    bits = (seed + 1).bit_length() - 1
    point, low, width, symbols = Fraction(seed + 1 - (1 << bits), 1 << bits), Fraction(0), Fraction(1), []
    for frequencies in tables:
        starts = [Fraction(start, 1 << 16) for start in (0, *accumulate(frequencies))]
        symbols.append(bisect_right([low + width * start for start in starts], point) - 1)
        low += width * starts[symbols[-1]]
        width *= Fraction(frequencies[symbols[-1]], 1 << 16)
    assert low <= point < low + width
    step = Fraction(2, 1 << bits)
    assert bits == 0 or -(-low // step) * step >= low + width  # a bit less would name nothing in there
    return symbols


def decode(data: bytes, tables: Tables, rate: int, shape_CHW: tuple[int, int, int]) -> Integers:
    """What `ContextualCodec.decode` gives for a payload that it accepts."""
    channels, height, width = shape_CHW
    ends = np.cumsum([0, *tables.lengths_T.tolist()]).tolist()
    bank = [tables.frequencies[start:end].tolist() for start, end in pairwise(ends)]
    live = [channel for channel in range(channels) if tables.low_RC[rate, channel] < tables.high_RC[rate, channel]]
    row = int((tables.low_RC[:rate] < tables.high_RC[:rate]).sum())
    rows = {channel: row + index for index, channel in enumerate(live)}
    known: dict[tuple[int, int, int], int] = {}

    def prior(channel: int, y: int, x: int, phase: int) -> int:
        index = rows[channel]
        across, down = (
            known.get((channel, y, x - 1), 0) + known.get((channel, y, x + 1), 0),
            known.get((channel, y - 1, x), 0) + known.get((channel, y + 1, x), 0),
        )
        near, here = tables.near_L2[index].tolist(), (y == 0, y == height - 1, x == 0, x == width - 1)
        guess = int(tables.bias_L2[index, phase])
        guess += sum(end for end, at in zip(tables.ends_L24[index, phase].tolist(), here, strict=True) if at)
        if phase:
            guess += int(tables.slope_L[index]) * (near[0] * across + near[1] * down)
        context = min(max(guess // 16, 0), (5, 11)[phase]) + (0, 6)[phase]
        return int(tables.prior_LK[index, context])

    costly = 1
    for channel in live:
        for which in tables.prior_LK[rows[channel], 6:].tolist():
            frequencies = bank[tables.table_E[which]]
            costly = max(costly, sum(f * (17 - f.bit_length()) for f in frequencies) >> 16)
    coder = Rans(int.from_bytes(data, "little"))
    for phase, components in enumerate((((1, 1), (0, 0)), ((0, 1), (1, 0)))):
        places = [
            (channel, y, x)
            for row, column in components
            for channel in live
            for y in range(row, height, 2)
            for x in range(column, width, 2)
        ]
        coded = sorted(((prior(*place, phase), place) for place in places), key=lambda pair: pair[0])
        count = max(0, len(coded) - min(24, 64 // costly)) if phase else len(coded)
        symbols = [coder.pop(bank[tables.table_E[which]]) for which, _ in coded[:count]]
        if phase:
            symbols += seeded_symbols(coder.rest(), [bank[tables.table_E[which]] for which, _ in coded[count:]])
        for (which, place), symbol in zip(coded, symbols, strict=True):
            known[place] = int(tables.first_E[which]) + symbol
    integers_CHW = np.repeat(tables.low_RC[rate].astype(np.int32), height * width).reshape(shape_CHW)
    for place, integer in known.items():
        integers_CHW[place] = integer
    return integers_CHW
