from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from models.codecs.factorized import FactorizedCodec, Floats, Integers, RateTables
from models.errors import BundleError, InvalidInput, PayloadCorrupt, PayloadTooLarge

CAP = 1 << 16
LARGE_SHA256 = (
    "4d14ed543d62f34e498fbfb803a394d1e86ea5055e50761a1c189fcb9caf8abb"  # of a payload of random tables and integers
)


def random_frequencies(rng: np.random.Generator, symbols: int) -> NDArray[np.int64]:
    """Skewed integer frequencies, each >= 1, that add up to 2**16; the last is the escape."""
    mass = rng.dirichlet(np.full(symbols, rng.choice([0.05, 0.3, 3.0])))
    counts = 1 + np.floor(mass * ((1 << 16) - symbols)).astype(np.int64)
    counts[rng.integers(symbols)] += (1 << 16) - counts.sum()
    return counts


def random_codec(seed: int, max_bytes: int = CAP) -> FactorizedCodec:
    """A codec of one to four channels and one to three rates."""
    rng = np.random.default_rng(seed)
    shape_CHW = (int(rng.integers(1, 5)), int(rng.integers(1, 7)), int(rng.integers(1, 7)))
    rates = []
    for _ in range(rng.integers(1, 4)):
        frequencies = tuple(random_frequencies(rng, int(rng.integers(2, 60))) for _ in range(shape_CHW[0]))
        gain_C = rng.uniform(0.1, 10, shape_CHW[0]).astype(np.float32)
        rates.append(RateTables(gain_C, rng.integers(-40, 40, shape_CHW[0]).astype(np.int32), frequencies))
    return FactorizedCodec(tuple(rates), shape_CHW, max_bytes)


def random_integers(codec: FactorizedCodec, rate: int, seed: int) -> Integers:
    """Integers anywhere within the tables of a rate, likely or not."""
    tables, rng = codec.rates[rate], np.random.default_rng(seed)
    spread = [
        rng.integers(first, last + 1, codec.shape_CHW[1:])
        for first, last in zip(tables.first_C, tables.last_C, strict=True)
    ]
    return np.stack(spread).astype(np.int32)


def likely_integers(codec: FactorizedCodec, rate: int, seed: int) -> Integers:
    """Integers drawn from the tables' own distribution."""
    tables, rng = codec.rates[rate], np.random.default_rng(seed)
    planes = []
    for first, frequencies in zip(tables.first_C, tables.frequencies, strict=True):
        chances = frequencies[:-1] / frequencies[:-1].sum()
        planes.append(first + rng.choice(len(chances), codec.shape_CHW[1:], p=chances))
    return np.stack(planes).astype(np.int32)


def fixed_codec(max_bytes: int = CAP) -> FactorizedCodec:
    """Two channels of 3 x 5 integers: -2 .. 2 and 0 .. 1."""
    frequencies = (np.array([1000, 9000, 45_000, 9000, 1535, 1]), np.array([60_000, 5535, 1]))
    tables = RateTables(np.array([1.0, 4.0], np.float32), np.array([-2, 0], np.int32), frequencies)
    return FactorizedCodec((tables,), (2, 3, 5), max_bytes)


FIXED = np.array([0, 1, -1, 0, 2, -2, 0, 0, 0, 1, 0, -1, 0, 0, 0] + [0, 1, 0, 0, 0] * 3, np.int32).reshape(2, 3, 5)


def rans_decode(data: bytes, channels: Sequence[tuple[NDArray[np.int64], int]]) -> list[int]:
    """rANS in plain integers, after the tables alone: 64-bit state, 32-bit words read from the end, 24-bit quantiles.

    `channels` has frequencies (of 2**16) and count for each run of symbols.
    """
    words = [int.from_bytes(data[at : at + 4], "little") for at in range(0, len(data), 4)]
    state = 0
    for _ in range(2):
        state = state << 32 | (words.pop() if words else 0)
    if len(data) == 4:
        state >>= 32  # one word is the whole state
    symbols = []
    for frequencies, count in channels:
        exact = [int(f) << 8 for f in frequencies]
        for _ in range(count):
            quantile, start, symbol = state & 0xFFFFFF, 0, 0
            while quantile >= start + exact[symbol]:
                start += exact[symbol]
                symbol += 1
            state = (state >> 24) * exact[symbol] + quantile - start
            if state < 1 << 32 and words:
                state = state << 32 | words.pop()
            symbols.append(symbol)
    assert state == 0
    assert not words
    return symbols


@given(seed=st.integers(0, 1 << 32))
def test_decode_undoes_encode_exactly(seed: int) -> None:
    codec = random_codec(seed)
    for rate in range(len(codec.rates)):
        for integers_CHW in (random_integers(codec, rate, seed), likely_integers(codec, rate, seed)):
            decoded_CHW = codec.decode(codec.encode(integers_CHW, rate), rate)
            np.testing.assert_array_equal(decoded_CHW, integers_CHW)
            assert decoded_CHW.dtype == np.int32


@given(seed=st.integers(0, 1 << 32))
def test_size_is_within_2_percent_and_32_bytes_of_the_ideal(seed: int) -> None:
    codec = random_codec(seed)
    for integers_CHW in (random_integers(codec, 0, seed), likely_integers(codec, 0, seed)):
        ideal_bytes = codec.ideal_bits(integers_CHW, 0) / 8
        assert len(codec.encode(integers_CHW, 0)) <= 1.02 * ideal_bytes + 32


def test_ideal_bits_are_those_of_the_frequencies() -> None:
    tables = RateTables(np.ones(1, np.float32), np.zeros(1, np.int32), (np.array([1 << 15, (1 << 15) - 1, 1]),))
    codec = FactorizedCodec((tables,), (1, 2, 2), CAP)
    assert codec.ideal_bits(np.zeros((1, 2, 2), np.int32), 0) == 4.0


@given(seed=st.integers(0, 1 << 32))
def test_the_integer_tables_alone_define_the_bytes(seed: int) -> None:
    codec = random_codec(seed)
    integers_CHW = random_integers(codec, 0, seed)
    tables, count = codec.rates[0], codec.shape_CHW[1] * codec.shape_CHW[2]
    symbols = rans_decode(codec.encode(integers_CHW, 0), [(f, count) for f in tables.frequencies])
    np.testing.assert_array_equal(symbols, (integers_CHW - tables.first_C[:, None, None]).ravel())


def test_payload_bytes_are_golden(golden: Callable[[str, bytes], None]) -> None:
    golden("factorized_v1.bin", fixed_codec().encode(FIXED, 0))


def test_large_payload_bytes_are_golden() -> None:
    codec = FactorizedCodec(random_codec(7).rates, (random_codec(7).shape_CHW[0], 40, 40), CAP)
    data = codec.encode(likely_integers(codec, 0, seed=7), 0)
    assert hashlib.sha256(data).hexdigest() == LARGE_SHA256


OTHER_PROCESS = """
import sys
import numpy as np
from models.codecs.factorized import FactorizedCodec, RateTables
frequencies = (np.array([1000, 9000, 45_000, 9000, 1535, 1]), np.array([60_000, 5535, 1]))
tables = RateTables(np.array([1.0, 4.0], np.float32), np.array([-2, 0], np.int32), frequencies)
codec = FactorizedCodec((tables,), (2, 3, 5), 1 << 16)
print(codec.decode(bytes.fromhex(sys.argv[1]), 0).ravel().tolist())
print(codec.encode(codec.decode(bytes.fromhex(sys.argv[1]), 0), 0).hex())
"""


@pytest.mark.parametrize("threads", ["1", "3"])
def test_another_process_with_other_threads_reads_and_writes_the_same_bytes(threads: str) -> None:
    data = fixed_codec().encode(FIXED, 0).hex()
    done = subprocess.run(
        [sys.executable, "-c", OTHER_PROCESS, data],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": threads},
    )
    assert done.stdout.split("\n")[:2] == [str(FIXED.ravel().tolist()), data]


@given(seed=st.integers(0, 1 << 32), flips=st.integers(0, 1 << 32))
def test_a_damaged_payload_is_refused_or_is_what_encode_writes(seed: int, flips: int) -> None:
    codec, rng = random_codec(seed), np.random.default_rng(flips)
    data = bytearray(codec.encode(likely_integers(codec, 0, seed), 0))
    if not data:
        return
    if rng.random() < 0.5:
        data[rng.integers(len(data))] ^= 1 << rng.integers(8)
    else:
        del data[rng.integers(len(data)) :]
    accepted_is_canonical(codec, bytes(data))


@given(seed=st.integers(0, 1 << 32), data=st.binary(max_size=300))
def test_random_bytes_are_refused_or_are_what_encode_writes(seed: int, data: bytes) -> None:
    accepted_is_canonical(random_codec(seed), data)


def accepted_is_canonical(codec: FactorizedCodec, data: bytes) -> None:
    """Bytes under no checksum: an error, or integers within the tables that encode to the very same bytes."""
    try:
        integers_CHW = codec.decode(data, 0)
    except PayloadCorrupt:
        return
    tables = codec.rates[0]
    assert (integers_CHW >= tables.first_C[:, None, None]).all()
    assert (integers_CHW <= tables.last_C[:, None, None]).all()
    assert codec.encode(integers_CHW, 0) == data


@pytest.mark.parametrize("data", [b"\1", b"\1\2\3", b"\1\2\3\4\5", bytes(4), b"\1\2\3\4" + bytes(4)])
def test_what_is_no_sequence_of_words_is_corrupt(data: bytes) -> None:
    with pytest.raises(PayloadCorrupt, match=f"{len(data)} bytes are not a sequence of 32-bit"):
        fixed_codec().decode(data, 0)


def test_bytes_left_over_are_corrupt() -> None:
    with pytest.raises(PayloadCorrupt, match="do not decode under the tables of rate 0"):
        fixed_codec().decode(b"\1\2\3\4" * 50, 0)


def test_the_escape_symbol_is_corrupt() -> None:
    small = FactorizedCodec(fixed_codec().rates, (2, 1, 1), CAP)
    start_of_escape = ((1 << 16) - 1) << 8  # of channel 0; as the whole state it decodes to the escape, then to 0
    with pytest.raises(PayloadCorrupt, match="do not decode"):
        small.decode(start_of_escape.to_bytes(4, "little"), 0)


def test_encode_keeps_the_cap() -> None:
    size = len(fixed_codec().encode(FIXED, 0))
    assert len(fixed_codec(max_bytes=size).encode(FIXED, 0)) == size
    with pytest.raises(PayloadTooLarge, match=f"{size} bytes at rate 0, the bundle's cap is {size - 1}"):
        fixed_codec(max_bytes=size - 1).encode(FIXED, 0)


def test_decode_keeps_the_cap() -> None:
    with pytest.raises(PayloadTooLarge, match="20 bytes, the bundle's cap is 16"):
        fixed_codec(max_bytes=16).decode(b"\1" * 20, 0)


def test_quantise_rounds_after_the_gain() -> None:
    latent_CHW = np.zeros((2, 3, 5), np.float32)
    latent_CHW[0, 0, :4] = 0.4, 0.6, -1.4, -1.6
    latent_CHW[1, 0, :3] = 0.1, 0.2, 0.3  # times 4
    integers_CHW = fixed_codec().quantise(latent_CHW, 0)
    assert integers_CHW[0, 0].tolist() == [0, 1, -1, -2, 0]
    assert integers_CHW[1, 0].tolist() == [0, 1, 1, 0, 0]


def test_quantise_saturates_at_the_tables() -> None:
    with np.errstate(over="ignore"):
        integers_CHW = fixed_codec().quantise(np.full((2, 3, 5), 3e38, np.float32), 0)
        lowest_CHW = fixed_codec().quantise(np.full((2, 3, 5), -3e38, np.float32), 0)
    assert (integers_CHW[0] == 2).all()
    assert (integers_CHW[1] == 1).all()
    assert (lowest_CHW[0] == -2).all()
    assert (lowest_CHW[1] == 0).all()


@pytest.mark.parametrize(("value", "integer"), [(np.nan, 0), (np.inf, 2), (-np.inf, -2)])
def test_quantise_takes_what_is_not_finite(value: float, integer: int) -> None:
    latent_CHW = np.full((2, 3, 5), value, np.float32)
    assert (fixed_codec().quantise(latent_CHW, 0)[0] == integer).all()


@given(seed=st.integers(0, 1 << 32))
def test_every_latent_can_be_sent(seed: int) -> None:
    codec = random_codec(seed)
    latent_CHW: Floats = np.random.default_rng(seed).standard_cauchy(codec.shape_CHW).astype(np.float32)
    integers_CHW = codec.quantise(latent_CHW, 0)
    np.testing.assert_array_equal(codec.decode(codec.encode(integers_CHW, 0), 0), integers_CHW)


def test_dequantise_divides_by_the_gain() -> None:
    latent_CHW = fixed_codec().dequantise(FIXED, 0)
    np.testing.assert_array_equal(latent_CHW[0], FIXED[0])
    np.testing.assert_array_equal(latent_CHW[1], FIXED[1] / 4)
    assert latent_CHW.dtype == np.float32


@pytest.mark.parametrize("value", [-3, 3])
def test_integers_outside_the_tables_are_not_encoded(value: int) -> None:
    integers_CHW = FIXED.copy()
    integers_CHW[0, 0, 0] = value
    with pytest.raises(InvalidInput, match="outside the tables of rate 0"):
        fixed_codec().encode(integers_CHW, 0)


def test_a_latent_of_another_shape_is_refused() -> None:
    with pytest.raises(InvalidInput, match=r"shape \(2, 5, 3\), the bundle says \(2, 3, 5\)"):
        fixed_codec().quantise(np.zeros((2, 5, 3), np.float32), 0)


@pytest.mark.parametrize("rate", [-1, 1, 1 << 31])
def test_a_rate_that_does_not_exist_is_refused(rate: int) -> None:
    with pytest.raises(InvalidInput, match=f"rate {rate} does not exist, the bundle has rates 0 to 0"):
        fixed_codec().decode(b"", rate)


def test_tables_for_other_channels_are_refused() -> None:
    with pytest.raises(BundleError, match="tables of rate 0 are for"):
        FactorizedCodec(fixed_codec().rates, (3, 3, 5), CAP)
