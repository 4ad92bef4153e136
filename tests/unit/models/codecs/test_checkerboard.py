from __future__ import annotations

import dataclasses
import hashlib
import os
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from isthmus.models.codecs.checkerboard import ContextualCodec, to_tensors
from isthmus.models.codecs.context_model import ALL_CONTEXTS, Integers
from isthmus.models.codecs.phase_order import PhaseOrder
from isthmus.models.errors import BundleError, InvalidInput, PayloadCorrupt, PayloadTooLarge
from tests.unit.models.codecs import reference
from tests.unit.models.codecs.codec_tables import (
    CAP,
    FIXED,
    fixed_codec,
    fixed_tables,
    random_codec,
    random_integers,
    random_tables,
)

SEEDS = st.integers(0, 1 << 32)
LARGE_SHA256 = "195961b47f54c6bdf54d7e5141398b6a19c8ae63783c217ea0bbe8a252a8267a"  # of random tables and integers


@given(seed=SEEDS)
def test_decode_undoes_encode_exactly(seed: int) -> None:
    codec = random_codec(seed)
    for rate in codec.rates:
        integers_CHW = random_integers(codec, rate, seed)
        decoded_CHW = codec.decode(codec.encode(integers_CHW, rate), rate)
        np.testing.assert_array_equal(decoded_CHW, integers_CHW)
        assert decoded_CHW.dtype == np.int32


@given(seed=SEEDS)
def test_the_integer_tables_alone_define_the_bytes(seed: int) -> None:
    codec = random_codec(seed)
    for rate in codec.rates:
        integers_CHW = random_integers(codec, rate, seed)
        data = codec.encode(integers_CHW, rate)
        np.testing.assert_array_equal(reference.decode(data, codec.tables, rate, codec.shape_CHW), integers_CHW)


def test_at_most_24_symbols_make_the_seed() -> None:
    cheap = dataclasses.replace(fixed_tables(), prior_LK=np.repeat(np.array([[0], [1]], np.uint8), ALL_CONTEXTS, 1))
    codec = ContextualCodec(cheap, (3, 9, 9), CAP)
    integers_CHW = random_integers(codec, 0, seed=0)
    order, symbols_N = codec.to_phases(integers_CHW, 0)[1]
    assert len(symbols_N) - order.ends_T[-1] == 24
    data = codec.encode(integers_CHW, 0)
    np.testing.assert_array_equal(reference.decode(data, cheap, 0, (3, 9, 9)), integers_CHW)


@given(seed=SEEDS)
def test_size_is_within_one_percent_and_four_bytes_of_the_ideal(seed: int) -> None:
    codec = random_codec(seed)
    integers_CHW = random_integers(codec, 0, seed)
    assert len(codec.encode(integers_CHW, 0)) <= 1.01 * codec.ideal_bits(integers_CHW, 0) / 8 + 4


def test_likely_integers_take_less_than_a_byte_more_than_the_ideal() -> None:
    codec = ContextualCodec(fixed_tables(), (3, 19, 19), CAP)
    rng, excess = np.random.default_rng(0), []
    for _ in range(50):
        integers_CHW = np.stack([rng.choice([-1, 0, 0, 1], (19, 19)), np.ones((19, 19)), rng.random((19, 19)) < 0.1])
        data = codec.encode(integers_CHW.astype(np.int32), 0)
        excess.append(len(data) - codec.ideal_bits(integers_CHW.astype(np.int32), 0) / 8)
    assert np.mean(excess) < 0.75


def test_ideal_bits_are_those_of_the_frequencies_in_their_contexts() -> None:
    codec = ContextualCodec(fixed_tables(), (3, 1, 2), CAP)
    integers_CHW = np.array([[[2, 1]], [[1, 1]], [[0, 0]]], np.int32)
    # Channel 0: three ends make the first context 3, a 2 to the left the second 6 + 8. Channel 2: 0 and 6 + 2.
    expected = 4 * 16 - np.log2([1000, 17_536, 60_000, 60_000]).sum()
    assert codec.ideal_bits(integers_CHW, 0) == pytest.approx(expected)


def test_payload_bytes_are_golden(golden: Callable[[str, bytes], None]) -> None:
    golden("contextual_v1.bin", fixed_codec().encode(FIXED, 0))


def test_large_payload_bytes_are_golden() -> None:
    codec = ContextualCodec(random_tables(7, 4), (4, 40, 40), CAP)
    data = b"".join(codec.encode(random_integers(codec, rate, seed=7), rate) for rate in codec.rates)
    assert hashlib.sha256(data).hexdigest() == LARGE_SHA256


OTHER_PROCESS = """
import sys
import safetensors.numpy
from isthmus.models.codecs.checkerboard import ContextualCodec, from_tensors
codec = ContextualCodec(from_tensors(safetensors.numpy.load_file(sys.argv[1]), 1), (3, 3, 5), 1 << 16)
integers_CHW = codec.decode(bytes.fromhex(sys.argv[2]), 0)
print(integers_CHW.ravel().tolist())
print(codec.encode(integers_CHW, 0).hex())
"""


@pytest.mark.parametrize("threads", ["1", "3"])
def test_another_process_with_other_threads_reads_and_writes_the_same_bytes(threads: str, tmp_path: Path) -> None:
    safetensors.numpy.save_file(to_tensors(fixed_tables()), tmp_path / "tables.safetensors")
    data = fixed_codec().encode(FIXED, 0).hex()
    done = subprocess.run(
        [sys.executable, "-c", OTHER_PROCESS, str(tmp_path / "tables.safetensors"), data],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads},
    )
    assert done.stdout.split("\n")[:2] == [str(FIXED.ravel().tolist()), data]


@given(seed=SEEDS, flips=SEEDS)
def test_a_damaged_payload_is_refused_or_is_what_encode_writes(seed: int, flips: int) -> None:
    codec, rng = random_codec(seed), np.random.default_rng(flips)
    data = bytearray(codec.encode(random_integers(codec, 0, seed), 0))
    way = rng.integers(3)
    if way == 0 and data:
        data[rng.integers(len(data))] ^= 1 << rng.integers(8)
    elif way == 1 and data:
        del data[rng.integers(len(data)) :]
    else:
        data += rng.bytes(int(rng.integers(1, 9)))
    accepted_is_canonical(codec, bytes(data))


@given(seed=SEEDS, data=st.binary(max_size=300))
def test_random_bytes_are_refused_or_are_what_encode_writes(seed: int, data: bytes) -> None:
    accepted_is_canonical(random_codec(seed), data)


def accepted_is_canonical(codec: ContextualCodec, data: bytes) -> None:
    """Bytes under no checksum: an error, or integers within the tables that encode to the very same bytes."""
    try:
        integers_CHW = codec.decode(data, 0)
    except PayloadCorrupt:
        return
    assert (integers_CHW >= codec.tables.low_RC[0][:, None, None]).all()
    assert (integers_CHW <= codec.tables.high_RC[0][:, None, None]).all()
    assert codec.encode(integers_CHW, 0) == data


@given(data=st.binary(min_size=1, max_size=4))
def test_every_number_of_a_small_latent_stands_for_one_latent(data: bytes) -> None:
    codec = ContextualCodec(fixed_tables(), (3, 1, 2), CAP)
    accepted_is_canonical(codec, data)


def test_a_zero_at_the_end_is_corrupt() -> None:
    with pytest.raises(PayloadCorrupt, match="3 bytes end with a zero, which is never written"):
        fixed_codec().decode(b"\1\2\0", 0)


def test_bytes_left_over_are_corrupt() -> None:
    with pytest.raises(PayloadCorrupt, match="200 bytes do not decode with the tables of rate 0"):
        fixed_codec().decode(b"\1\2\3\4" * 50, 0)


def test_an_integer_that_its_channel_cannot_take_is_corrupt() -> None:
    codec = ContextualCodec(fixed_tables(), (3, 1, 2), CAP)
    priors: list[list[int]] = []

    def read(order: PhaseOrder) -> Integers:
        priors.append(order.priors_N.tolist())
        return np.array([4, 1], np.int32) if len(priors) == 1 else np.array([0, 6], np.int32)

    with pytest.raises(ValueError, match="an integer is outside its channel's range"):
        codec.from_phases(read, 0)
    assert priors == [[0, 1], [1, 4]]


def test_a_latent_of_one_place_has_no_second_phase() -> None:
    codec = ContextualCodec(fixed_tables(), (3, 1, 1), CAP)
    for first in range(-2, 3):
        integers_CHW = np.array([first, 1, 0], np.int32).reshape(3, 1, 1)
        np.testing.assert_array_equal(codec.decode(codec.encode(integers_CHW, 0), 0), integers_CHW)
    with pytest.raises(PayloadCorrupt, match="20 bytes hold more than the integers of rate 0"):
        codec.decode(b"\1" * 20, 0)


def test_hostile_bytes_take_no_more_memory_than_they_have() -> None:
    codec = ContextualCodec(random_tables(7, 4), (4, 19, 19), 1 << 20)
    data = np.random.default_rng(0).bytes(1 << 20)
    tracemalloc.start()
    try:
        with pytest.raises(PayloadCorrupt):
            codec.decode(data, 0)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 8 * len(data)


def test_encode_keeps_the_cap() -> None:
    size = len(fixed_codec().encode(FIXED, 0))
    assert len(fixed_codec(max_bytes=size).encode(FIXED, 0)) == size
    with pytest.raises(PayloadTooLarge, match=f"{size} bytes at rate 0, the bundle's cap is {size - 1}"):
        fixed_codec(max_bytes=size - 1).encode(FIXED, 0)


def test_decode_keeps_the_cap() -> None:
    with pytest.raises(PayloadTooLarge, match="20 bytes, the bundle's cap is 16"):
        fixed_codec(max_bytes=16).decode(b"\1" * 20, 0)


def test_quantise_rounds_after_the_gain() -> None:
    latent_CHW = np.zeros((3, 3, 5), np.float32)
    latent_CHW[0, 0, :4] = 0.4, 0.6, -1.4, -1.6
    latent_CHW[2, 0, :3] = 0.1, 0.2, 0.3  # times 4
    integers_CHW = fixed_codec().quantise(latent_CHW, 0)
    assert integers_CHW[0, 0].tolist() == [0, 1, -1, -2, 0]
    assert integers_CHW[2, 0].tolist() == [0, 1, 1, 0, 0]


@pytest.mark.parametrize(
    ("value", "integers"),
    [(3e38, [2, 1, 1]), (-3e38, [-2, 1, 0]), (np.inf, [2, 1, 1]), (-np.inf, [-2, 1, 0]), (np.nan, [0, 1, 0])],
)
def test_quantise_clips_to_what_channels_can_take(value: float, integers: list[int]) -> None:
    with np.errstate(over="ignore"):
        integers_CHW = fixed_codec().quantise(np.full((3, 3, 5), value, np.float32), 0)
    assert integers_CHW[:, 1, 2].tolist() == integers
    assert integers_CHW.dtype == np.int32


@given(seed=SEEDS)
def test_every_latent_can_be_sent(seed: int) -> None:
    codec = random_codec(seed)
    latent_CHW = np.random.default_rng(seed).standard_cauchy(codec.shape_CHW).astype(np.float32)
    integers_CHW = codec.quantise(latent_CHW, 0)
    np.testing.assert_array_equal(codec.decode(codec.encode(integers_CHW, 0), 0), integers_CHW)


def test_dequantise_divides_by_the_gain() -> None:
    latent_CHW = fixed_codec().dequantise(FIXED, 0)
    np.testing.assert_array_equal(latent_CHW[0], FIXED[0])
    np.testing.assert_array_equal(latent_CHW[2], FIXED[2] / 4)
    assert latent_CHW.dtype == np.float32


@pytest.mark.parametrize(
    ("channel", "value"), [(0, -3), (0, 3), (0, 1 << 16), (0, -(1 << 31)), (1, 0), (1, 2), (2, -1), (2, 2)]
)
def test_integers_outside_the_tables_are_not_encoded(channel: int, value: int) -> None:
    integers_CHW = FIXED.copy()
    integers_CHW[channel, 2, 4] = value
    with pytest.raises(InvalidInput, match="outside the tables of rate 0"):
        fixed_codec().encode(integers_CHW, 0)


def test_a_latent_of_another_shape_is_refused() -> None:
    with pytest.raises(InvalidInput, match=r"shape \(3, 5, 3\), the bundle says \(3, 3, 5\)"):
        fixed_codec().quantise(np.zeros((3, 5, 3), np.float32), 0)
    with pytest.raises(InvalidInput, match=r"shape \(3, 5, 3\), the bundle says \(3, 3, 5\)"):
        fixed_codec().encode(np.zeros((3, 5, 3), np.int32), 0)


@pytest.mark.parametrize("rate", [-1, 1, 1 << 31])
def test_a_rate_that_does_not_exist_is_refused(rate: int) -> None:
    with pytest.raises(InvalidInput, match=f"rate {rate} does not exist, the bundle has rates 0 to 0"):
        fixed_codec().decode(b"", rate)


def test_silent_channels_cost_nothing() -> None:
    codec = ContextualCodec(fixed_tables(), (3, 19, 19), CAP)
    integers_CHW = np.zeros((3, 19, 19), np.int32)
    integers_CHW[1] = 1
    assert sum(len(order.positions_N) for order, _ in codec.to_phases(integers_CHW, 0)) == 2 * 19 * 19
    assert (codec.decode(codec.encode(integers_CHW, 0), 0)[1] == 1).all()


def test_a_rate_of_silent_channels_has_one_payload() -> None:
    tables = random_tables(3, 1)
    rate = next(r for r in range(len(tables.low_RC)) if tables.low_RC[r, 0] == tables.high_RC[r, 0])
    codec = ContextualCodec(tables, (1, 3, 3), CAP)
    assert codec.encode(np.full((1, 3, 3), tables.low_RC[rate, 0], np.int32), rate) == b""
    assert (codec.decode(b"", rate) == tables.low_RC[rate, 0]).all()
    with pytest.raises(PayloadCorrupt, match="hold more"):
        codec.decode(b"\1", rate)


def test_tables_for_other_channels_are_refused() -> None:
    with pytest.raises(BundleError, match="tables are for 3 channels, expected 4"):
        ContextualCodec(fixed_tables(), (4, 3, 5), CAP)
