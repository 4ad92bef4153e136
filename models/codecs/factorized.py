"""Bottleneck codec with a factorized prior: floats -> integers -> rANS bytes, and back, at several rates.

Knows nothing about networks, images or the wire. NumPy and `constriction` alone, so the device needs no PyTorch.

    latent_CHW --gain[rate]--> round, clip --> integers_CHW --tables[rate]--> bytes      device
    latent_CHW <--gain[rate]------------------ integers_CHW <--tables[rate]-- bytes      cloud

Source: factorized prior of Balle et al., "Variational image compression with a scale hyperprior" (ICLR 2018),
appendix 6.1; one gain vector a rate, Cui et al., "Asymmetric Gained Deep Image Compression" (CVPR 2021).

The frequencies are integers frozen in the bundle. `constriction` takes floats, but only ever sees exact integers:
it gives n symbols one unit each and spreads the rest of 2**24 in proportion; weights f*256 - 1 for 16-bit frequencies
f add up to exactly that rest, so its scale is exactly 1 and no rounding takes place on any machine.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import constriction
import numpy as np
from numpy.typing import NDArray

from models.errors import BundleError, InvalidInput, PayloadCorrupt, PayloadTooLarge

FREQUENCY_BITS = 16  # CompressAI's precision
CODER_BITS = 24  # constriction's
MAX_SYMBOLS = 4096  # a channel's alphabet; larger ones are a broken table, not a better prior
MAX_INTEGER = 1 << 23  # float32 still tells neighbours apart, and int32 sums cannot wrap

Floats = NDArray[np.float32]
Integers = NDArray[np.int32]


@dataclass(frozen=True)
class RateTables:
    """Quantiser and prior of one rate.

    gain_C: integers = round(latent * gain).
    first_C: the integer that symbol 0 of a channel stands for.
    frequencies: one int64 array a channel, each entry >= 1, sum 2**16; its last symbol is CompressAI's escape,
        which we never write: integers outside a table are clipped to it.
    """

    gain_C: Floats
    first_C: Integers
    frequencies: tuple[NDArray[np.int64], ...]

    @property
    def last_C(self) -> Integers:
        """The largest integer of each channel."""
        return self.first_C + np.array([len(f) - 2 for f in self.frequencies], dtype=np.int32)


class FactorizedCodec:
    """Encodes and decodes latents of one shape under one bundle's tables."""

    def __init__(self, rates: tuple[RateTables, ...], shape_CHW: tuple[int, int, int], max_bytes: int) -> None:
        """`max_bytes` caps every payload, written or read.

        Raises BundleError when tables and shape disagree.
        """
        for rate, tables in enumerate(rates):
            check_tables(rate, tables, shape_CHW[0])
        self.rates = rates
        self.shape_CHW = shape_CHW
        self.max_bytes = max_bytes
        self._models = [[coder_model(f) for f in tables.frequencies] for tables in rates]

    def quantise(self, latent_CHW: Floats, rate: int) -> Integers:
        """The integers a latent is sent as. Values no table reaches are clipped; NaN counts as zero."""
        tables = self._tables(rate)
        if latent_CHW.shape != self.shape_CHW:
            raise InvalidInput(f"latent has shape {latent_CHW.shape}, the bundle says {self.shape_CHW}")
        rounded = np.rint(np.nan_to_num(latent_CHW * tables.gain_C[:, None, None]))
        clipped = np.clip(rounded, tables.first_C[:, None, None], tables.last_C[:, None, None])
        integers_CHW: Integers = clipped.astype(np.int32)
        return integers_CHW

    def dequantise(self, integers_CHW: Integers, rate: int) -> Floats:
        """The latent that the integers stand for."""
        tables = self._tables(rate)
        return integers_CHW.astype(np.float32) / tables.gain_C[:, None, None]

    def encode(self, integers_CHW: Integers, rate: int) -> bytes:
        """Integers -> little-endian 32-bit rANS words.

        Raises InvalidInput outside the tables' range, PayloadTooLarge above the cap.
        """
        tables = self._tables(rate)
        symbols_CN = (integers_CHW - tables.first_C[:, None, None]).reshape(self.shape_CHW[0], -1)
        sizes_C1 = np.array([[len(f) - 1] for f in tables.frequencies])
        if (symbols_CN < 0).any() or (symbols_CN >= sizes_C1).any():
            raise InvalidInput(f"integers outside the tables of rate {rate}")
        coder = constriction.stream.stack.AnsCoder()
        for model, symbols_N in zip(reversed(self._models[rate]), symbols_CN[::-1], strict=True):
            coder.encode_reverse(np.ascontiguousarray(symbols_N, dtype=np.int32), model)
        data: bytes = coder.get_compressed().astype("<u4").tobytes()
        if len(data) > self.max_bytes:
            raise PayloadTooLarge(f"{len(data)} bytes at rate {rate}, the bundle's cap is {self.max_bytes}")
        return data

    def decode(self, data: bytes, rate: int) -> Integers:
        """rANS words -> integers; exactly what was encoded or an error.

        Raises PayloadTooLarge above the cap, PayloadCorrupt when the bytes are not what `encode` writes.
        """
        self.check(len(data), rate)
        tables = self._tables(rate)
        if len(data) % 4 or (data and data[-4:] == bytes(4)):
            raise PayloadCorrupt(f"{len(data)} bytes are not a sequence of 32-bit rANS words")
        coder = constriction.stream.stack.AnsCoder(np.frombuffer(data, dtype="<u4").astype(np.uint32))
        channels, height, width = self.shape_CHW
        symbols_CN = np.empty((channels, height * width), dtype=np.int32)
        for row, model in zip(symbols_CN, self._models[rate], strict=True):
            row[:] = coder.decode(model, height * width)
        escapes_C1 = np.array([[len(f) - 1] for f in tables.frequencies])
        if not coder.is_empty() or (symbols_CN == escapes_C1).any():
            raise PayloadCorrupt(f"{len(data)} bytes do not decode under the tables of rate {rate}")
        return symbols_CN.reshape(self.shape_CHW) + tables.first_C[:, None, None]

    def check(self, size: int, rate: int) -> None:
        """Raise PayloadTooLarge or InvalidInput when no payload of this size and rate can be ours."""
        self._tables(rate)
        if size > self.max_bytes:
            raise PayloadTooLarge(f"{size} bytes, the bundle's cap is {self.max_bytes}")

    def ideal_bits(self, integers_CHW: Integers, rate: int) -> float:
        """Code length under the frozen frequencies: the bound that `encode` is measured against."""
        tables = self._tables(rate)
        symbols_CN = (integers_CHW - tables.first_C[:, None, None]).reshape(self.shape_CHW[0], -1)
        pairs = zip(tables.frequencies, symbols_CN, strict=True)
        return float(sum((FREQUENCY_BITS - np.log2(f[symbols_N])).sum() for f, symbols_N in pairs))

    def _tables(self, rate: int) -> RateTables:
        if not 0 <= rate < len(self.rates):
            raise InvalidInput(f"rate {rate} does not exist, the bundle has rates 0 to {len(self.rates) - 1}")
        return self.rates[rate]


def coder_model(frequencies: NDArray[np.int64]) -> Any:
    """A `constriction` model whose probabilities are exactly frequencies / 2**16 (see the module's head)."""
    weights = (frequencies << (CODER_BITS - FREQUENCY_BITS)) - 1
    return constriction.stream.model.Categorical(weights.astype(np.float64), perfect=False)


def check_tables(rate: int, tables: RateTables, channels: int) -> None:
    """Raise BundleError unless the tables are usable for `channels` channels."""
    lengths = {len(tables.gain_C), len(tables.first_C), len(tables.frequencies)}
    if lengths != {channels}:
        raise BundleError(f"tables of rate {rate} are for {sorted(lengths)} channels, expected {channels}")
    if not (np.isfinite(tables.gain_C).all() and (tables.gain_C > 0).all()):
        raise BundleError(f"gains of rate {rate} must be positive and finite")
    if (np.abs(tables.first_C.astype(np.int64)) > MAX_INTEGER).any():
        raise BundleError(f"first integers of rate {rate} must lie within {MAX_INTEGER} of zero")
    for channel, frequencies in enumerate(tables.frequencies):
        if not 2 <= len(frequencies) <= MAX_SYMBOLS or (frequencies < 1).any():
            raise BundleError(f"table of rate {rate}, channel {channel}: needs 2 to {MAX_SYMBOLS} frequencies >= 1")
        if frequencies.sum() != 1 << FREQUENCY_BITS:
            raise BundleError(
                f"table of rate {rate}, channel {channel}: frequencies must add up to 2**{FREQUENCY_BITS}"
            )


def to_tensors(rates: tuple[RateTables, ...]) -> dict[str, NDArray[Any]]:
    """Tables -> flat arrays for a safetensors file; the mirror of `from_tensors`."""
    tensors: dict[str, NDArray[Any]] = {}
    for rate, tables in enumerate(rates):
        lengths = [len(f) for f in tables.frequencies]
        tensors[f"rate{rate}.gain"] = tables.gain_C
        tensors[f"rate{rate}.first"] = tables.first_C
        tensors[f"rate{rate}.lengths"] = np.array(lengths, dtype=np.int32)
        tensors[f"rate{rate}.frequencies"] = np.concatenate(tables.frequencies).astype(np.int32)
    return tensors


def from_tensors(tensors: Mapping[str, NDArray[Any]], count: int) -> tuple[RateTables, ...]:
    """Flat arrays -> tables of `count` rates. Raises BundleError when one is missing or of the wrong kind."""
    rates = []
    for rate in range(count):
        gain_C = vector(tensors, f"rate{rate}.gain", np.float32)
        first_C, lengths, flat = (
            vector(tensors, f"rate{rate}.{key}", np.int32) for key in ("first", "lengths", "frequencies")
        )
        if (lengths < 0).any() or lengths.sum(dtype=np.int64) != len(flat):
            raise BundleError(f"rate{rate}.lengths add up to {lengths.sum()}, there are {len(flat)} frequencies")
        frequencies = np.split(flat.astype(np.int64), np.cumsum(lengths)[:-1])
        rates.append(RateTables(gain_C, first_C, tuple(frequencies)))
    return tuple(rates)


def vector(tensors: Mapping[str, NDArray[Any]], name: str, dtype: type[np.generic]) -> NDArray[Any]:
    """One flat array of `tensors`, checked."""
    found = tensors.get(name)
    if found is None or found.ndim != 1 or found.dtype != dtype:
        what = "missing" if found is None else f"{found.dtype} of shape {found.shape}"
        raise BundleError(f"tensor {name} is {what}, expected a flat array of {np.dtype(dtype)}")
    return found
