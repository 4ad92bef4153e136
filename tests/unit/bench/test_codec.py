from __future__ import annotations

import numpy as np
import pytest

from isthmus.models.codecs.checkerboard import ContextualCodec
from isthmus.models.codecs.context_model import Integers
from isthmus.models.recipes.common.fit_tables import fit
from isthmus.models.vision.bundle import Bundle
from tests.bench.codec import SameTables, factorized_coder, measure, summary
from tests.bench.codec import latents as bench_latents

SHAPE_CHW = (3, 8, 7)
GAIN_RC = np.array([[1, 2, 1], [3, 5, 2]], np.float32)


def latents(count: int, seed: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """Random latents whose first channel is always zero at the first rate."""
    drawn = np.random.default_rng(seed).laplace(0, 0.5, (count, *SHAPE_CHW))
    drawn[:, 0] = np.clip(drawn[:, 0], -0.4, 0.4)
    return drawn.astype(np.float32)


@pytest.fixture(scope="module")
def codec() -> ContextualCodec:
    return ContextualCodec(fit(quantised(40, seed=0), GAIN_RC), SHAPE_CHW, 4096)


def quantised(count: int, seed: int) -> list[Integers]:
    return [np.rint(latents(count, seed) * gain_C[:, None, None]).astype(np.int32) for gain_C in GAIN_RC]


def test_compressai_reads_its_own_bytes_under_our_priors(codec: ContextualCodec) -> None:
    for rate in codec.rates:
        same = SameTables(codec, rate)
        for latent_CHW in latents(5, seed=1):
            integers_CHW = codec.quantise(latent_CHW, rate)
            np.testing.assert_array_equal(same.decode(same.encode(integers_CHW)), integers_CHW)


def test_compressai_takes_as_many_bytes_under_our_priors(codec: ContextualCodec) -> None:
    for latent_CHW in latents(5, seed=1):
        integers_CHW = codec.quantise(latent_CHW, 1)
        sizes = len(SameTables(codec, 1).encode(integers_CHW)), len(codec.encode(integers_CHW, 1))
        assert abs(sizes[0] - sizes[1]) <= 8


def test_the_factorized_coder_is_fitted_to_what_it_reads() -> None:
    integers_NCHW = quantised(20, seed=0)[1]
    coder = factorized_coder(integers_NCHW)
    for integers_CHW in integers_NCHW[:3]:
        bits = 0.0
        for plane, all_planes in zip(integers_CHW, integers_NCHW.swapaxes(0, 1), strict=True):
            shares = [(all_planes == integer).mean() for integer in plane.ravel()]
            bits -= np.log2(shares).sum()
        floats = coder._quantized_cdf.new_tensor(integers_CHW).float()[None]
        assert bits / 8 - 1 < len(coder.compress(floats)[0]) < bits / 8 + 10


def test_every_rate_is_measured(codec: ContextualCodec) -> None:
    rows = measure(codec, list(latents(3, seed=1)))
    assert [row["rate"] for row in rows] == [0, 1]
    for row in rows:
        assert len(row["speedups"]) == len(row["speedups_same_tables"]) == 3
        assert row["bytes"] >= row["ideal_bytes"] > 0
        assert row["bytes_vs_factorized"] == row["bytes"] / row["compressai_bytes"]


def test_a_coder_that_misreads_is_noticed(codec: ContextualCodec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SameTables, "decode", lambda self, data: np.zeros(SHAPE_CHW, np.int32))
    with pytest.raises(ValueError, match="rate 0: a coder does not read what was written"):
        measure(codec, list(latents(2, seed=1)))


def test_the_summary_takes_medians_over_photos_and_the_worst_overhead() -> None:
    rows = [
        {"speedups": [1.0, 9.0], "speedups_same_tables": [2.0], "overhead_vs_ideal": 0.1, "bytes_vs_factorized": 0.5},
        {"speedups": [5.0], "speedups_same_tables": [4.0], "overhead_vs_ideal": 0.2, "bytes_vs_factorized": 0.7},
    ]
    assert summary(rows) == {
        "speedup_vs_compressai": 5.0,
        "speedup_vs_compressai_same_tables": 3.0,
        "overhead_vs_ideal": 0.2,
        "bytes_vs_factorized": pytest.approx(0.6),
    }


def test_latents_are_those_of_a_tap_at_its_full_width(tiny_bundle: Bundle) -> None:
    for tap, entry in enumerate(tiny_bundle.manifest.taps):
        found = bench_latents(tiny_bundle, tap, 2)
        assert [latent_CHW.shape for latent_CHW in found] == [entry.latent] * 2
        assert not np.array_equal(found[0], found[1])
