"""Which prior each integer of a latent is coded under, from integers that are already known. Integer sums and lookups.

Knows nothing about frequencies or bytes. Places are known in two phases, as on a checkerboard:

    0 1 0 1 0    phase 0: nothing is known yet but where the image ends
    1 0 1 0 1    phase 1: the neighbours to both sides, above and below
    0 1 0 1 0

A context is a guess of the integer, slope * sum of neighbours + bias, cut into steps of 2**STEP_BITS. What lies outside
the image counts as zero, so its ends have biases of their own.

Source: He et al., "Checkerboard Context Model" (CVPR 2021), with weighted sums in place of a network.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

PHASES = 2
QUARTERS = ((1, 1), (0, 0), (0, 1), (1, 0))  # parity of row and column; two quarters a phase
CONTEXTS = (slice(0, 6), slice(6, 18))  # contexts of a phase, among all of a channel
ALL_CONTEXTS = 18
STEP_BITS = 4
ENDS = 4  # first row, last row, first column, last column
OUTSIDE = 255  # in place of a prior where there is no integer; sorts behind all priors

Integers = NDArray[np.int32]
Flat = NDArray[np.int16]
Priors = NDArray[np.uint8]


class Lattice:
    """Some channels of a latent as one flat array: quarter after quarter, channel after channel, row after row.

    A neighbour is at the same distance everywhere. Where the image ends it is a zero: between rows, between channels,
    or before the first quarter, whose rows and columns are the odd ones and leave room for it.
    """

    def __init__(self, shape_CHW: tuple[int, int, int], live: Sequence[int]) -> None:
        """`live` are the channels that are laid out; the others count as zeros."""
        self.shape_CHW = shape_CHW
        channels, height, width = shape_CHW
        self._grid = (len(live), height // 2 + 1, width // 2 + 1)
        self._stride = width // 2 + 1
        self.slot = (height // 2 + 1) * self._stride  # places of a channel in a quarter
        self.half = 2 * len(live) * self.slot  # places of a phase
        self._phases = [slice(self._stride + self.half * p, self._stride + self.half * (p + 1)) for p in range(PHASES)]
        length = 2 * self._stride + 2 * self.half
        index_CHW = np.arange(channels * height * width).reshape(shape_CHW)
        self._place, self.inside = np.zeros(length, np.intp), np.zeros(length, np.int16)
        for quarter, (row, column) in enumerate(QUARTERS):
            part = index_CHW[live, row::2, column::2]
            self._quarter(self._place, quarter)[:, : part.shape[1], : part.shape[2]] = part
            self._quarter(self.inside, quarter)[:, : part.shape[1], : part.shape[2]] = 1
        self._back = np.full(channels * height * width, length - 1)
        self._back[self._place[self.inside > 0]] = np.flatnonzero(self.inside)

    def spread(self, integers_CHW: NDArray[np.integer[Any]]) -> Flat:
        """Integers (..., C, H, W) within 16 bits -> (..., length)."""
        planes = integers_CHW.reshape(*integers_CHW.shape[:-3], -1)
        flat: Flat = planes.take(self._place, axis=-1).astype(np.int16)
        flat *= self.inside
        return flat

    def collect(self, flat: Flat) -> Flat:
        """The inverse of `spread`, for one latent."""
        return flat.take(self._back).reshape(self.shape_CHW)

    def blank(self) -> Flat:
        """No integers known yet."""
        return np.zeros(len(self.inside), np.int16)

    def phase(self, flat: Flat, phase: int) -> Flat:
        """The part of a flat array that a phase makes known, a view."""
        part: Flat = flat[..., self._phases[phase]]
        return part

    def neighbours(self, flat: Flat) -> tuple[Flat, Flat]:
        """For each place of phase 1 the sum of what is left and right of it, and of what is above and below."""
        odd, size, stride = self._stride, self.half // 2, self._stride
        even = odd + size
        across, down = (np.empty((*flat.shape[:-1], self.half), np.int16) for _ in range(2))
        np.add(flat[..., even : even + size], flat[..., even + 1 : even + 1 + size], out=across[..., :size])
        np.add(flat[..., odd - 1 : even - 1], flat[..., odd:even], out=across[..., size:])
        np.add(flat[..., odd - stride : even - stride], flat[..., odd:even], out=down[..., :size])
        np.add(flat[..., even : even + size], flat[..., even + stride : even + stride + size], out=down[..., size:])
        return across, down

    def ends(self) -> Flat:
        """Bit by bit for each place: is it in the first row, the last row, the first column, the last column?"""
        ends_CHW = np.zeros(self.shape_CHW, np.int32)
        for bit, end in enumerate((np.s_[:, 0], np.s_[:, -1], np.s_[:, :, 0], np.s_[:, :, -1])):
            ends_CHW[end] |= 1 << bit
        return self.spread(ends_CHW)

    def channels(self) -> NDArray[np.intp]:
        """Which of the laid out channels each place of a phase belongs to."""
        return np.tile(np.repeat(np.arange(self._grid[0]), self.slot), 2)

    def _quarter(self, flat: NDArray[np.generic], quarter: int) -> NDArray[np.generic]:
        start = self._stride + quarter * self.half // 2
        return flat[start : start + self.half // 2].reshape(self._grid)


@dataclass(frozen=True)
class Weights:
    """Of the contexts of C channels.

    low, high: the integers a channel may take. near: how often sums across and down count in phase 1, slope: how much
    each neighbour then does. bias: of each phase. ends: what each of the image's ends adds to it.
    """

    low_C: NDArray[np.int8]
    high_C: NDArray[np.int8]
    near_C2: NDArray[np.uint8]
    slope_C: NDArray[np.int16]
    bias_C2: NDArray[np.int16]
    ends_C24: NDArray[np.int8]

    def sums(self, channel: int, phase: int) -> NDArray[np.intp]:
        """Every sum that the neighbours of a place can have."""
        count = 2 * int(self.near_C2[channel].sum(dtype=np.intp)) if phase else 0
        low, high = min(0, int(self.low_C[channel])), max(0, int(self.high_C[channel]))
        return np.arange(count * low, count * high + 1)

    def reach(self) -> int:
        """No sum is larger, not even between channels."""
        largest = max(map(abs, (*self.low_C.tolist(), *self.high_C.tolist())), default=0)
        near: int = self.near_C2.sum(1, dtype=np.intp).max(initial=0)
        return 2 * largest * int(near)

    def contexts(self, channel: int, phase: int, ends: int) -> NDArray[np.intp]:
        """The context for each of these sums, at a combination of the image's ends."""
        bias = int(self.bias_C2[channel, phase])
        bias += sum(int(self.ends_C24[channel, phase, end]) for end in range(ENDS) if ends >> end & 1)
        guesses = int(self.slope_C[channel]) * self.sums(channel, phase) + bias
        among = CONTEXTS[phase]
        return among.start + np.clip(guesses >> STEP_BITS, 0, among.stop - among.start - 1)


class Contexts:
    """Lookups from sums of neighbours to priors, for one rate."""

    def __init__(self, lattice: Lattice, weights: Weights, prior_CK: Priors) -> None:
        """`prior_CK` are the priors of each channel's contexts."""
        self.lattice = lattice
        lookup, base_N = tabulate(lattice, weights, prior_CK, 0)
        self._first = lookup[base_N]
        self._lookup, self._base = tabulate(lattice, weights, prior_CK, 1)
        near_C2 = weights.near_C2.astype(np.int16)
        self._across, self._down = near_C2[lattice.channels()].T.copy()

    def priors(self, flat: Flat, phase: int) -> Priors:
        """The prior of each place of a phase, OUTSIDE where there is no integer.

        `flat` (..., length) must hold the phase before, within what its channels can take.
        """
        if phase == 0:
            return self._first
        index, down = self.lattice.neighbours(flat)
        index *= self._across
        down *= self._down
        index += down
        priors: Priors = self._lookup.take(index + self._base)
        return priors


def tabulate(
    lattice: Lattice, weights: Weights, prior_CK: Priors, phase: int
) -> tuple[Priors, NDArray[np.int16] | NDArray[np.int32]]:
    """The priors of a phase in one array, and for each place where in it the prior for a sum of zero is.

    Places of one channel at the same ends share a part of it. Those outside the image share one that says OUTSIDE.
    """
    kind_N = lattice.channels() << ENDS | lattice.phase(lattice.ends(), phase)
    inside_N = lattice.phase(lattice.inside, phase) > 0
    parts: list[Priors] = []
    size, zeros = 0, np.zeros((len(prior_CK) << ENDS) + 1, np.intp)
    for kind in np.unique(kind_N[inside_N]).tolist():
        channel, ends = divmod(kind, 1 << ENDS)
        parts.append(prior_CK[channel, weights.contexts(channel, phase, ends)])
        sums = weights.sums(channel, phase)
        zeros[kind] = size - sums[0]
        size += len(sums)
    reach = weights.reach()
    parts.append(np.full(2 * reach + 1, OUTSIDE, np.uint8))
    zeros[-1] = size + reach
    base_N = zeros[np.where(inside_N, kind_N, -1)]
    return np.concatenate(parts), base_N.astype(np.int16 if size + 2 * reach < 1 << 15 else np.int32)
