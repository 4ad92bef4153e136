"""In which order the integers of a latent are coded, and with which priors. Knows nothing about bytes."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from isthmus.models.codecs.context_model import PHASES, Checkerboard, ContextLookup, Flat, Integers, Priors
from isthmus.models.codecs.tables import Tables

SEED_BITS = 64  # at most, of a seed whose symbols all have the costliest prior; below 24 the coder wastes the rest
MAX_SEEDED = 24  # symbols of a seed; each takes half a microsecond


class PhaseOrder(NamedTuple):
    """The positions of one phase in the order of the payload: sorted by prior, so that each table has one span of them.

    first: the integer that symbol 0 stands for. ends: of each table's span; symbols after the last one form the seed.
    """

    positions_N: NDArray[np.intp]
    priors_N: Priors
    first_N: Flat
    ends_T: list[int]


class PhaseOrders:
    """The orders of both phases at one rate, and the range of each channel."""

    def __init__(self, tables: Tables, rate: int, shape_CHW: tuple[int, int, int]) -> None:
        low_C, high_C = tables.low_RC[rate].astype(np.int32), tables.high_RC[rate].astype(np.int32)
        self.gain_C11, self.low_C11, self.high_C11 = (x[:, None, None] for x in (tables.gain_RC[rate], low_C, high_C))
        self.board = Checkerboard(shape_CHW, np.flatnonzero(low_C < high_C).tolist())
        self._contexts = ContextLookup(self.board, *tables.contexts(rate))
        self._low_CHW = np.broadcast_to(self.low_C11, shape_CHW).copy()
        self._span_CHW = np.broadcast_to(self.high_C11 - self.low_C11, shape_CHW).astype(np.uint32)
        low, high = (self.board.scatter(np.broadcast_to(x, shape_CHW)) for x in (self.low_C11, self.high_C11))
        self._bounds = [
            (self.board.phase(low, phase), self.board.phase(high - low, phase).view(np.uint16))
            for phase in range(PHASES)
        ]
        self._silent_CHW = np.where(self._span_CHW == 0, self._low_CHW, 0)
        self._first_E = tables.first_E
        self._seeded = min(MAX_SEEDED, SEED_BITS // tables.bits(rate))
        self._ends_T = np.searchsorted(tables.table_E, np.arange(len(tables.lengths_T)), side="right").astype(np.uint8)
        self._counts = [int(self.board.phase(self.board.inside, phase).sum()) for phase in range(PHASES)]
        self._first_order = self._order(self.board.blank(), 0)

    def of(self, flat: Flat, phase: int) -> PhaseOrder:
        """The order of a phase; that of non-anchors needs the anchors in `flat`."""
        return self._order(flat, phase) if phase else self._first_order

    def any_outside(self, integers_CHW: Integers) -> bool:
        """Whether any integer is outside its channel's range."""
        return bool(((integers_CHW - self._low_CHW).view(np.uint32) > self._span_CHW).any())

    def out_of_range(self, flat: Flat, phase: int) -> bool:
        """Whether any integer of a phase is outside its channel's range."""
        low, span = self._bounds[phase]
        return bool(((self.board.phase(flat, phase) - low).view(np.uint16) > span).any())

    def gather(self, flat: Flat) -> Integers:
        """Flat integers, and the only integer of each silent channel, as (C, H, W)."""
        integers_CHW: Integers = self.board.gather(flat) + self._silent_CHW
        return integers_CHW

    def _order(self, flat: Flat, phase: int) -> PhaseOrder:
        priors = self._contexts.priors(flat, phase)
        positions_N = priors.argsort(kind="stable")[: self._counts[phase]]
        priors_N = priors.take(positions_N)
        coded = max(0, len(priors_N) - self._seeded) if phase == PHASES - 1 else len(priors_N)
        ends_T = priors_N[:coded].searchsorted(self._ends_T).tolist()
        return PhaseOrder(positions_N, priors_N, self._first_E.take(priors_N), ends_T)
