"""Bottleneck codec with a checkerboard context model: floats -> integers -> rANS bytes, and back, at several rates.

Knows nothing about networks, images or the wire. Needs NumPy and `constriction` only, no PyTorch.

    latent_CHW --gain--> round, clip --> integers_CHW --scatter--> anchors, non-anchors --tables--> bytes      device
    latent_CHW <--gain------------------ integers_CHW <--gather--- anchors, non-anchors <--tables-- bytes      cloud

A bundle has a bank of integer frequency tables. A *prior* is a table with the integer that its first symbol stands for.
A lookup names one prior for each context (`context_model`) of each channel and rate, so no side information is sent.
Anchors are coded first, non-anchors in the context of anchors. Within each of these two phases, positions are sorted by
prior, so that each table codes all its symbols in one call. A channel that can only take one integer is *silent*: it
costs nothing.

Source: He et al., "Checkerboard Context Model" (CVPR 2021); Brummer and De Vleeschouwer, "End-to-end optimized image
compression with competition of prior distributions" (CVPRW 2021), with a context in place of sent indexes; one gain
vector a rate, Cui et al., "Asymmetric Gained Deep Image Compression" (CVPR 2021).

`constriction` takes floats, but only ever sees exact integers: it gives n symbols one unit each and distributes the
rest of 2**24 in proportion; weights f*256 - 1 for 16-bit frequencies f add up to exactly that rest, so its scale is
exactly 1 and no rounding takes place on any machine. The coder's initial state is a number made of the last few symbols
(`models.codecs.seed`) and its final state is another; a payload is that one, little-endian, without leading zeros.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import constriction
import numpy as np
from numpy.typing import NDArray

from isthmus.models.codecs.context_model import PHASES, Integers
from isthmus.models.codecs.phase_order import PhaseOrder, PhaseOrders
from isthmus.models.codecs.seed import seed_of, symbols_of
from isthmus.models.codecs.tables import FREQUENCY_BITS, Tables, check_tables, from_tensors, to_tensors
from isthmus.models.errors import InvalidInput, PayloadCorrupt, PayloadTooLarge

__all__ = ["ContextualCodec", "Tables", "from_tensors", "to_tensors"]

CODER_BITS = 24  # constriction's

Floats = NDArray[np.float32]


class ContextualCodec:
    """Encodes and decodes latents of one shape with one bundle's tables."""

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
        self._orders = [PhaseOrders(tables, rate, shape_CHW) for rate in self.rates]

    def quantise(self, latent_CHW: Floats, rate: int) -> Integers:
        """The integers that represent a latent. Values outside a channel's range are clipped; NaN counts as zero."""
        orders = self._orders_of(rate)
        self._check_shape(latent_CHW.shape)
        rounded = np.rint(np.nan_to_num(latent_CHW * orders.gain_C11))
        integers_CHW: Integers = np.clip(rounded, orders.low_C11, orders.high_C11).astype(np.int32)
        return integers_CHW

    def dequantise(self, integers_CHW: Integers, rate: int) -> Floats:
        """The latent that integers represent."""
        latent_CHW: Floats = integers_CHW.astype(np.float32) / self._orders_of(rate).gain_C11
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
        phases = self.to_phases(integers_CHW, rate)
        order, symbols_N = phases[-1]
        coder = coder_from(seed_of(symbols_N[order.ends_T[-1] :].tolist(), self._seed_starts(order)))
        for order, symbols_N in reversed(phases):
            *starts, end = (0, *order.ends_T)
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

        def read(order: PhaseOrder) -> Integers:
            symbols, start = [np.empty(0, np.int32)], 0
            for model, end in zip(self._models, order.ends_T, strict=True):
                if start < end:
                    symbols.append(coder.decode(model, end - start))
                start = end
            if start < len(order.priors_N):
                seed = int.from_bytes(coder.get_compressed().astype("<u4").tobytes(), "little")
                symbols.append(np.array(symbols_of(seed, self._seed_starts(order)), np.int32))
                coder.clear()
            return np.concatenate(symbols)

        try:
            integers_CHW = self.from_phases(read, rate)
        except ValueError as error:
            raise PayloadCorrupt(f"{len(data)} bytes do not decode with the tables of rate {rate}") from error
        if not coder.is_empty():
            raise PayloadCorrupt(f"{len(data)} bytes hold more than the integers of rate {rate}")
        return integers_CHW

    def to_phases(self, integers_CHW: Integers, rate: int) -> list[tuple[PhaseOrder, Integers]]:
        """The order and the symbols of each phase. Raises InvalidInput outside the tables' range."""
        orders, phases = self._orders_of(rate), []
        self._check_shape(integers_CHW.shape)
        if orders.any_outside(integers_CHW):
            raise InvalidInput(f"integers outside the tables of rate {rate}")
        flat = orders.board.scatter(integers_CHW)
        for phase in range(PHASES):
            order = orders.of(flat, phase)
            symbols_N = orders.board.phase(flat, phase).take(order.positions_N) - order.first_N
            phases.append((order, symbols_N.astype(np.int32)))
        return phases

    def from_phases(self, read: Callable[[PhaseOrder], Integers], rate: int) -> Integers:
        """The inverse of `to_phases`: `read` returns the symbols of each phase in turn, from its order.

        Raises ValueError when an integer is outside its channel's range.
        """
        orders = self._orders_of(rate)
        flat = orders.board.blank()
        for phase in range(PHASES):
            order = orders.of(flat, phase)
            orders.board.phase(flat, phase)[order.positions_N] = read(order).astype(np.int16) + order.first_N
            if orders.out_of_range(flat, phase):
                raise ValueError("an integer is outside its channel's range")
        return orders.gather(flat)

    def check(self, size: int, rate: int) -> None:
        """Raise PayloadTooLarge or InvalidInput when a payload of this size and rate cannot be valid."""
        self._orders_of(rate)
        if size > self.max_bytes:
            raise PayloadTooLarge(f"{size} bytes, the bundle's cap is {self.max_bytes}")

    def ideal_bits(self, integers_CHW: Integers, rate: int) -> float:
        """Code length in bits under the tables' frequencies: the lower bound of what `encode` writes."""
        bank, bits = self.tables.bank(), 0.0
        for order, symbols_N in self.to_phases(integers_CHW, rate):
            tables_N = self.tables.table_E[order.priors_N]
            for table in np.unique(tables_N):
                bits += float((FREQUENCY_BITS - np.log2(bank[table][symbols_N[tables_N == table]])).sum())
        return bits

    def _check_shape(self, shape: tuple[int, ...]) -> None:
        if shape != self.shape_CHW:
            raise InvalidInput(f"latent has shape {shape}, the bundle says {self.shape_CHW}")

    def _orders_of(self, rate: int) -> PhaseOrders:
        if not 0 <= rate < len(self.rates):
            raise InvalidInput(f"rate {rate} does not exist, the bundle has rates 0 to {len(self.rates) - 1}")
        return self._orders[rate]

    def _seed_starts(self, order: PhaseOrder) -> list[list[int]]:
        return [self._starts_E[prior] for prior in order.priors_N[order.ends_T[-1] :].tolist()]


def coder_from(number: int) -> Any:
    """An rANS coder whose state is a number; zero stands for an empty coder."""
    size = -(-number.bit_length() // 32) * 4
    return constriction.stream.stack.AnsCoder(np.frombuffer(number.to_bytes(size, "little"), "<u4").astype(np.uint32))


def coder_model(frequencies: NDArray[np.int64]) -> Any:
    """A `constriction` model whose probabilities are exactly frequencies / 2**16 (see the module's docstring)."""
    weights = (frequencies << (CODER_BITS - FREQUENCY_BITS)) - 1
    return constriction.stream.model.Categorical(weights.astype(np.float64), perfect=False)
