"""Bottleneck codec whose prior follows its context: floats -> integers -> rANS bytes, and back, at several rates.

Knows nothing about networks, images or the wire. NumPy and `constriction` alone, so the device needs no PyTorch.

    latent_CHW --gain--> round, clip --> integers_CHW --> phases --> by prior --tables--> bytes      device
    latent_CHW <--gain------------------ integers_CHW <-- phases <-- by prior <--tables-- bytes      cloud

A bundle has a bank of integer frequency tables. A *prior* is a table placed at its first integer. A lookup names one
for each context (`context_model`) of each channel and rate, so no side information is sent. Within a phase
places are sorted by prior, and each table runs once over all that use it. A channel that can only take one integer is
*silent*: it costs nothing.

Source: Brummer and De Vleeschouwer, "End-to-end optimized image compression with competition of prior distributions"
(CVPRW 2021), with a context in place of sent indexes; one gain vector a rate, Cui et al., "Asymmetric Gained Deep Image
Compression" (CVPR 2021).

`constriction` takes floats, but only ever sees exact integers: it gives n symbols one unit each and spreads the rest of
2**24 in proportion; weights f*256 - 1 for 16-bit frequencies f add up to exactly that rest, so its scale is exactly 1
and no rounding takes place on any machine. The coder starts from a number that the last few symbols make
(`models.codecs.seed`) and ends with another; a payload is that one, little-endian, without leading zeros.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import constriction
import numpy as np
from numpy.typing import NDArray

from isthmus.models.codecs.context_model import PHASES, Contexts, Flat, Integers, Lattice, Priors
from isthmus.models.codecs.seed import seed_of, symbols_of
from isthmus.models.codecs.tables import FREQUENCY_BITS, Tables, check_tables, from_tensors, to_tensors
from isthmus.models.errors import InvalidInput, PayloadCorrupt, PayloadTooLarge

__all__ = ["ContextualCodec", "Tables", "from_tensors", "to_tensors"]

CODER_BITS = 24  # constriction's
SEED_BITS = 64  # that symbols of the costliest prior would make a seed of; below 24 the coder wastes the rest
MAX_SEEDED = 24  # symbols; each takes half a microsecond

Floats = NDArray[np.float32]


class Run(NamedTuple):
    """One phase in the order of the payload: its places are sorted by prior, so each table has one part of it.

    first: the integer that symbol 0 stands for. ends: of each table's part; what follows the last makes the seed.
    """

    order_N: NDArray[np.intp]
    priors_N: Priors
    first_N: Flat
    ends_T: list[int]


class ContextualCodec:
    """Encodes and decodes latents of one shape under one bundle's tables."""

    def __init__(self, tables: Tables, shape_CHW: tuple[int, int, int], max_bytes: int) -> None:
        """`max_bytes` caps every payload, written or read.

        Raises BundleError when tables and shape disagree.
        """
        check_tables(tables, shape_CHW[0])
        self.tables = tables
        self.rates = range(len(tables.gain_RC))
        self.shape_CHW = shape_CHW
        self.max_bytes = max_bytes
        self._models = [coder_model(frequencies) for frequencies in tables.bank()]
        starts_T = [[0, *np.cumsum(frequencies).tolist()] for frequencies in tables.bank()]
        self._starts_E = [starts_T[table] for table in tables.table_E.tolist()]
        self._plans = [_Plan(tables, rate, shape_CHW) for rate in self.rates]

    def quantise(self, latent_CHW: Floats, rate: int) -> Integers:
        """The integers a latent is sent as. Values a channel cannot take are clipped; NaN counts as zero."""
        plan = self._plan(rate)
        self._check_shape(latent_CHW.shape)
        rounded = np.rint(np.nan_to_num(latent_CHW * plan.gain_C11))
        integers_CHW: Integers = np.clip(rounded, plan.low_C11, plan.high_C11).astype(np.int32)
        return integers_CHW

    def dequantise(self, integers_CHW: Integers, rate: int) -> Floats:
        """The latent that the integers stand for."""
        latent_CHW: Floats = integers_CHW.astype(np.float32) / self._plan(rate).gain_C11
        return latent_CHW

    def compress(self, latent_CHW: Floats, rate: int) -> tuple[int, bytes]:
        """The payload of a latent at `rate`, or at the next cheaper rate that keeps the cap, and that rate.

        Raises PayloadTooLarge when none does.
        """
        for cheaper in range(rate, 0, -1):
            with contextlib.suppress(PayloadTooLarge):
                return cheaper, self.encode(self.quantise(latent_CHW, cheaper), cheaper)
        return 0, self.encode(self.quantise(latent_CHW, 0), 0)

    def encode(self, integers_CHW: Integers, rate: int) -> bytes:
        """Integers -> bytes.

        Raises InvalidInput outside the tables' range, PayloadTooLarge above the cap.
        """
        laid = self.lay(integers_CHW, rate)
        run, symbols_N = laid[-1]
        coder = coder_from(seed_of(symbols_N[run.ends_T[-1] :].tolist(), self._seed_starts(run)))
        for run, symbols_N in reversed(laid):
            *starts, end = (0, *run.ends_T)
            for model, start in zip(reversed(self._models), reversed(starts), strict=True):
                if start < end:
                    coder.encode_reverse(symbols_N[start:end], model)
                end = start
        data: bytes = coder.get_compressed().astype("<u4").tobytes().rstrip(b"\0")
        if len(data) > self.max_bytes:
            raise PayloadTooLarge(f"{len(data)} bytes at rate {rate}, the bundle's cap is {self.max_bytes}")
        return data

    def decode(self, data: bytes, rate: int) -> Integers:
        """Bytes -> integers; exactly what was encoded or an error.

        Raises PayloadTooLarge above the cap, PayloadCorrupt when the bytes are not what `encode` writes.
        """
        self.check(len(data), rate)
        if data.endswith(b"\0"):
            raise PayloadCorrupt(f"{len(data)} bytes end with a zero, which is never written")
        coder = coder_from(int.from_bytes(data, "little"))

        def read(run: Run) -> Integers:
            symbols, start = [np.empty(0, np.int32)], 0
            for model, end in zip(self._models, run.ends_T, strict=True):
                if start < end:
                    symbols.append(coder.decode(model, end - start))
                start = end
            if start < len(run.priors_N):
                seed = int.from_bytes(coder.get_compressed().astype("<u4").tobytes(), "little")
                symbols.append(np.array(symbols_of(seed, self._seed_starts(run)), np.int32))
                coder.clear()
            return np.concatenate(symbols)

        try:
            integers_CHW = self.fill(read, rate)
        except ValueError as error:
            raise PayloadCorrupt(f"{len(data)} bytes do not decode under the tables of rate {rate}") from error
        if not coder.is_empty():
            raise PayloadCorrupt(f"{len(data)} bytes hold more than the integers of rate {rate}")
        return integers_CHW

    def lay(self, integers_CHW: Integers, rate: int) -> list[tuple[Run, Integers]]:
        """Each phase and its symbols. Raises InvalidInput outside the tables' range."""
        plan, laid = self._plan(rate), []
        self._check_shape(integers_CHW.shape)
        if plan.outside(integers_CHW):
            raise InvalidInput(f"integers outside the tables of rate {rate}")
        flat = plan.lattice.spread(integers_CHW)
        for phase in range(PHASES):
            run = plan.run(flat, phase)
            symbols_N = plan.lattice.phase(flat, phase).take(run.order_N) - run.first_N
            laid.append((run, symbols_N.astype(np.int32)))
        return laid

    def fill(self, read: Callable[[Run], Integers], rate: int) -> Integers:
        """The inverse of `lay`: `read` is given each phase in turn and gives its symbols.

        Raises ValueError when a channel cannot take them.
        """
        plan = self._plan(rate)
        flat = plan.lattice.blank()
        for phase in range(PHASES):
            run = plan.run(flat, phase)
            plan.lattice.phase(flat, phase)[run.order_N] = read(run).astype(np.int16) + run.first_N
            if plan.beyond(flat, phase):
                raise ValueError("a channel cannot take its integer")
        return plan.collect(flat)

    def check(self, size: int, rate: int) -> None:
        """Raise PayloadTooLarge or InvalidInput when no payload of this size and rate can be ours."""
        self._plan(rate)
        if size > self.max_bytes:
            raise PayloadTooLarge(f"{size} bytes, the bundle's cap is {self.max_bytes}")

    def ideal_bits(self, integers_CHW: Integers, rate: int) -> float:
        """Code length under the frozen frequencies: the bound that `encode` is measured against."""
        bank, bits = self.tables.bank(), 0.0
        for run, symbols_N in self.lay(integers_CHW, rate):
            tables_N = self.tables.table_E[run.priors_N]
            for table in np.unique(tables_N):
                bits += float((FREQUENCY_BITS - np.log2(bank[table][symbols_N[tables_N == table]])).sum())
        return bits

    def _check_shape(self, shape: tuple[int, ...]) -> None:
        if shape != self.shape_CHW:
            raise InvalidInput(f"latent has shape {shape}, the bundle says {self.shape_CHW}")

    def _plan(self, rate: int) -> _Plan:
        if not 0 <= rate < len(self.rates):
            raise InvalidInput(f"rate {rate} does not exist, the bundle has rates 0 to {len(self.rates) - 1}")
        return self._plans[rate]

    def _seed_starts(self, run: Run) -> list[list[int]]:
        return [self._starts_E[prior] for prior in run.priors_N[run.ends_T[-1] :].tolist()]


class _Plan:
    """What coding at one rate needs, worked out once."""

    def __init__(self, tables: Tables, rate: int, shape_CHW: tuple[int, int, int]) -> None:
        low_C, high_C = tables.low_RC[rate].astype(np.int32), tables.high_RC[rate].astype(np.int32)
        self.gain_C11, self.low_C11, self.high_C11 = (x[:, None, None] for x in (tables.gain_RC[rate], low_C, high_C))
        self.lattice = Lattice(shape_CHW, np.flatnonzero(low_C < high_C).tolist())
        self._contexts = Contexts(self.lattice, *tables.contexts(rate))
        self._low_CHW = np.broadcast_to(self.low_C11, shape_CHW).copy()
        self._span_CHW = np.broadcast_to(self.high_C11 - self.low_C11, shape_CHW).astype(np.uint32)
        low, high = (self.lattice.spread(np.broadcast_to(x, shape_CHW)) for x in (self.low_C11, self.high_C11))
        self._bounds = [
            (self.lattice.phase(low, phase), self.lattice.phase(high - low, phase).view(np.uint16))
            for phase in range(PHASES)
        ]
        self._silent_CHW = np.where(self._span_CHW == 0, self._low_CHW, 0)
        self._first_E = tables.first_E
        self._seeded = min(MAX_SEEDED, SEED_BITS // tables.bits(rate))
        self._ends_T = np.searchsorted(tables.table_E, np.arange(len(tables.lengths_T)), side="right").astype(np.uint8)
        self._counts = [int(self.lattice.phase(self.lattice.inside, phase).sum()) for phase in range(PHASES)]
        self._first_run = self._run(self.lattice.blank(), 0)

    def run(self, flat: Flat, phase: int) -> Run:
        """A phase, once the phase before is known."""
        return self._run(flat, phase) if phase else self._first_run

    def outside(self, integers_CHW: Integers) -> bool:
        """Whether any integer is one that its channel cannot take."""
        return bool(((integers_CHW - self._low_CHW).view(np.uint32) > self._span_CHW).any())

    def beyond(self, flat: Flat, phase: int) -> bool:
        """Whether any integer of a phase is one that its channel cannot take."""
        low, span = self._bounds[phase]
        return bool(((self.lattice.phase(flat, phase) - low).view(np.uint16) > span).any())

    def collect(self, flat: Flat) -> Integers:
        """Flat integers and the silent channels' own as (C, H, W)."""
        integers_CHW: Integers = self.lattice.collect(flat) + self._silent_CHW
        return integers_CHW

    def _run(self, flat: Flat, phase: int) -> Run:
        priors = self._contexts.priors(flat, phase)
        order_N = priors.argsort(kind="stable")[: self._counts[phase]]
        priors_N = priors.take(order_N)
        coded = max(0, len(priors_N) - self._seeded) if phase == PHASES - 1 else len(priors_N)
        ends_T = priors_N[:coded].searchsorted(self._ends_T).tolist()
        return Run(order_N, priors_N, self._first_E.take(priors_N), ends_T)


def coder_from(number: int) -> Any:
    """An rANS coder that starts from a number; zero is an empty one."""
    size = -(-number.bit_length() // 32) * 4
    return constriction.stream.stack.AnsCoder(np.frombuffer(number.to_bytes(size, "little"), "<u4").astype(np.uint32))


def coder_model(frequencies: NDArray[np.int64]) -> Any:
    """A `constriction` model whose probabilities are exactly frequencies / 2**16 (see the module's head)."""
    weights = (frequencies << (CODER_BITS - FREQUENCY_BITS)) - 1
    return constriction.stream.model.Categorical(weights.astype(np.float64), perfect=False)
