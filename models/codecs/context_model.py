"""The prior of each integer of a latent, from integers that are already known. Integer sums and lookups only.

Knows nothing about frequencies or bytes. Positions form a checkerboard of two phases:

    0 1 0 1 0    phase 0, the anchors: nothing is known but where the image ends
    1 0 1 0 1    phase 1, the non-anchors: the four anchors around each are known
    0 1 0 1 0

A context is a guess of the integer, slope * sum of neighbours + bias, cut into steps of 2**STEP_BITS. What lies outside
the image counts as zero, so positions at its ends have additional biases.

Source: He et al., "Checkerboard Context Model" (CVPR 2021), with weighted sums in place of a network.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

ANCHOR, NON_ANCHOR = 0, 1  # the phases
PHASES = 2
# Parity of row and column of the four polyphase components: the first two are the anchors, the others the non-anchors.
COMPONENTS = ((1, 1), (0, 0), (0, 1), (1, 0))
CONTEXTS = (slice(0, 6), slice(6, 18))  # of each phase, among all contexts of a channel
ALL_CONTEXTS = 18
STEP_BITS = 4
ENDS = 4  # first row, last row, first column, last column
OUTSIDE = 255  # in place of a prior where there is no integer; sorts after all priors

Integers = NDArray[np.int32]
Flat = NDArray[np.int16]
Priors = NDArray[np.uint8]


class Checkerboard:
    """Layout of a latent's channels in a flat array: polyphase component by component, channel by channel, row by row.

    A neighbour is at the same distance everywhere. Outside the image it is a zero: padding between rows, between
    channels, or before the first component, whose rows and columns are the odd ones and leave room for it.
    """

    def __init__(self, shape_CHW: tuple[int, int, int], live: Sequence[int]) -> None:
        """`live` are the channels that the array holds; the others count as zeros."""
        self.shape_CHW = shape_CHW
        channels, height, width = shape_CHW
        self._grid = (len(live), height // 2 + 1, width // 2 + 1)
        self._stride = width // 2 + 1
        self.plane = (height // 2 + 1) * self._stride  # positions of a channel in a component, padding included
        self.phase_size = 2 * len(live) * self.plane  # positions of a phase, padding included
        self._phases = [
            slice(self._stride + self.phase_size * p, self._stride + self.phase_size * (p + 1)) for p in range(PHASES)
        ]
        length = 2 * self._stride + 2 * self.phase_size
        index_CHW = np.arange(channels * height * width).reshape(shape_CHW)
        self._index, self.inside = np.zeros(length, np.intp), np.zeros(length, np.int16)
        for component, (row, column) in enumerate(COMPONENTS):
            part = index_CHW[live, row::2, column::2]
            self._component(self._index, component)[:, : part.shape[1], : part.shape[2]] = part
            self._component(self.inside, component)[:, : part.shape[1], : part.shape[2]] = 1
        self._inverse = np.full(channels * height * width, length - 1)
        self._inverse[self._index[self.inside > 0]] = np.flatnonzero(self.inside)

    def scatter(self, integers_CHW: NDArray[np.integer[Any]]) -> Flat:
        """Integers (..., C, H, W) within 16 bits -> flat (..., length)."""
        planes = integers_CHW.reshape(*integers_CHW.shape[:-3], -1)
        flat: Flat = planes.take(self._index, axis=-1).astype(np.int16)
        flat *= self.inside
        return flat

    def gather(self, flat: Flat) -> Flat:
        """Flat (length,) -> (C, H, W): the inverse of `scatter`, for one latent."""
        return flat.take(self._inverse).reshape(self.shape_CHW)

    def blank(self) -> Flat:
        """A flat array in which no integer is known yet."""
        return np.zeros(len(self.inside), np.int16)

    def phase(self, flat: Flat, phase: int) -> Flat:
        """The part of a flat array that holds a phase, as a view."""
        part: Flat = flat[..., self._phases[phase]]
        return part

    def neighbours(self, flat: Flat) -> tuple[Flat, Flat]:
        """For each non-anchor the sum of the anchors to its left and right, and of those above and below it."""
        odd, size, stride = self._stride, self.phase_size // 2, self._stride
        even = odd + size
        across, down = (np.empty((*flat.shape[:-1], self.phase_size), np.int16) for _ in range(2))
        np.add(flat[..., even : even + size], flat[..., even + 1 : even + 1 + size], out=across[..., :size])
        np.add(flat[..., odd - 1 : even - 1], flat[..., odd:even], out=across[..., size:])
        np.add(flat[..., odd - stride : even - stride], flat[..., odd:even], out=down[..., :size])
        np.add(flat[..., even : even + size], flat[..., even + stride : even + stride + size], out=down[..., size:])
        return across, down

    def ends(self) -> Flat:
        """One bit each: whether a position is in the first row, the last row, the first column, the last column."""
        ends_CHW = np.zeros(self.shape_CHW, np.int32)
        for bit, end in enumerate((np.s_[:, 0], np.s_[:, -1], np.s_[:, :, 0], np.s_[:, :, -1])):
            ends_CHW[end] |= 1 << bit
        return self.scatter(ends_CHW)

    def channels(self) -> NDArray[np.intp]:
        """The index into `live` of the channel that each position of a phase belongs to."""
        return np.tile(np.repeat(np.arange(self._grid[0]), self.plane), 2)

    def _component(self, flat: NDArray[np.generic], component: int) -> NDArray[np.generic]:
        start = self._stride + component * self.phase_size // 2
        return flat[start : start + self.phase_size // 2].reshape(self._grid)


@dataclass(frozen=True)
class ContextWeights:
    """The weights of the contexts of C channels.

    low, high: the range of a channel's integers. near: the weights of horizontal and vertical sums of a non-anchor's
    neighbours; slope: the weight of both. bias: of each phase. ends: what each of the image's ends adds to the bias.
    """

    low_C: NDArray[np.int8]
    high_C: NDArray[np.int8]
    near_C2: NDArray[np.uint8]
    slope_C: NDArray[np.int16]
    bias_C2: NDArray[np.int16]
    ends_C24: NDArray[np.int8]

    def sums(self, channel: int, phase: int) -> NDArray[np.intp]:
        """Every sum that the neighbours of a position can have."""
        count = 2 * int(self.near_C2[channel].sum(dtype=np.intp)) if phase else 0
        low, high = min(0, int(self.low_C[channel])), max(0, int(self.high_C[channel]))
        return np.arange(count * low, count * high + 1)

    def reach(self) -> int:
        """An upper bound of the magnitude of any sum, even one across the padding between channels."""
        largest = max(map(abs, (*self.low_C.tolist(), *self.high_C.tolist())), default=0)
        near: int = self.near_C2.sum(1, dtype=np.intp).max(initial=0)
        return 2 * largest * int(near)

    def contexts(self, channel: int, phase: int, ends: int) -> NDArray[np.intp]:
        """The context for each of `sums`, at a combination of the image's ends."""
        bias = int(self.bias_C2[channel, phase])
        bias += sum(int(self.ends_C24[channel, phase, end]) for end in range(ENDS) if ends >> end & 1)
        guesses = int(self.slope_C[channel]) * self.sums(channel, phase) + bias
        among = CONTEXTS[phase]
        return among.start + np.clip(guesses >> STEP_BITS, 0, among.stop - among.start - 1)


class ContextLookup:
    """Lookups from sums of neighbours to priors, for one rate."""

    def __init__(self, board: Checkerboard, weights: ContextWeights, prior_CK: Priors) -> None:
        """`prior_CK`: the prior of each context of each channel."""
        self.board = board
        lookup, base_N = tabulate(board, weights, prior_CK, ANCHOR)
        self._anchors = lookup[base_N]
        self._lookup, self._base = tabulate(board, weights, prior_CK, NON_ANCHOR)
        near_C2 = weights.near_C2.astype(np.int16)
        self._across, self._down = near_C2[board.channels()].T.copy()

    def priors(self, flat: Flat, phase: int) -> Priors:
        """The prior of each position of a phase, OUTSIDE where there is no integer.

        For non-anchors `flat` (..., length) must hold the anchors, each within its channel's range.
        """
        if phase == ANCHOR:
            return self._anchors
        index, down = self.board.neighbours(flat)
        index *= self._across
        down *= self._down
        index += down
        priors: Priors = self._lookup.take(index + self._base)
        return priors


def tabulate(
    board: Checkerboard, weights: ContextWeights, prior_CK: Priors, phase: int
) -> tuple[Priors, NDArray[np.int16] | NDArray[np.int32]]:
    """The priors of a phase in one array, and for each position the index of its prior for a sum of zero.

    Positions of one channel at the same ends share a part of the array. Those outside the image share one of OUTSIDE.
    """
    kind_N = board.channels() << ENDS | board.phase(board.ends(), phase)
    inside_N = board.phase(board.inside, phase) > 0
    parts: list[Priors] = []
    size, zero = 0, np.zeros((len(prior_CK) << ENDS) + 1, np.intp)
    for kind in np.unique(kind_N[inside_N]).tolist():
        channel, ends = divmod(kind, 1 << ENDS)
        parts.append(prior_CK[channel, weights.contexts(channel, phase, ends)])
        sums = weights.sums(channel, phase)
        zero[kind] = size - sums[0]
        size += len(sums)
    reach = weights.reach()
    parts.append(np.full(2 * reach + 1, OUTSIDE, np.uint8))
    zero[-1] = size + reach
    base_N = zero[np.where(inside_N, kind_N, -1)]
    return np.concatenate(parts), base_N.astype(np.int16 if size + 2 * reach < 1 << 15 else np.int32)
