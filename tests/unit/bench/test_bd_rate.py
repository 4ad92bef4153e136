from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import ArrayLike

from tests.bench.bd_rate import (
    Curves,
    Floats,
    bd_rate,
    bd_rate_at_most,
    bytes_at,
    envelope,
    estimate,
    resampling_weights,
    shared_quality,
)

SIZES = st.lists(st.integers(8, 100_000), min_size=2, max_size=12, unique=True)
# Rates and qualities that implementations of the classical fit are commonly tried on (Anserw/Bjontegaard_metric).
CLASSIC = ([686.76, 309.58, 157.11, 85.95], [40.28, 37.18, 34.24, 31.42])
CLASSIC_REFERENCE = ([893.34, 407.8, 204.93, 112.75], [40.39, 37.21, 34.17, 31.24])


def curve(sizes: ArrayLike, quality: ArrayLike) -> Curves:
    return envelope(np.atleast_2d(np.asarray(sizes, float)), np.atleast_2d(np.asarray(quality, float)))


@st.composite
def settings(draw: st.DrawFn) -> tuple[list[int], list[float]]:
    """Bytes and qualities in any order; the cheapest setting is worse than all others."""
    sizes = sorted(draw(SIZES))
    worse = draw(st.lists(st.floats(60, 90), min_size=len(sizes) - 1, max_size=len(sizes) - 1))
    order = draw(st.permutations(range(len(sizes))))
    qualities = [50.0, *worse]
    return [sizes[i] for i in order], [qualities[i] for i in order]


@given(settings())
def test_a_curve_against_itself_saves_nothing(found: tuple[list[int], list[float]]) -> None:
    assert bd_rate(curve(*found), curve(*found)) == 0


@given(settings(), st.floats(1, 8))
def test_all_bytes_divided_is_the_same_saving_everywhere(found: tuple[list[int], list[float]], divisor: float) -> None:
    sizes, quality = found
    less = curve(np.array(sizes) / divisor, quality)
    assert bd_rate(less, curve(sizes, quality)) == pytest.approx(1 / divisor - 1, abs=1e-9)
    assert bd_rate(curve(sizes, quality), less) == pytest.approx(divisor - 1, abs=1e-8)


@given(st.lists(st.tuples(st.integers(8, 99), st.floats(50, 90)), min_size=2, max_size=12), st.data())
def test_the_order_of_settings_does_not_matter(found: list[tuple[int, float]], data: st.DataObject) -> None:
    """Not even among settings of equal bytes or quality."""
    reference = curve([10.0, 10_000.0], [40.0, 95.0])
    shuffled = data.draw(st.permutations(found))
    one, other = (bd_rate(curve(*zip(*points, strict=True)), reference) for points in (found, shuffled))
    np.testing.assert_array_equal(one, other)


@given(settings())
def test_the_envelope_rises_and_no_setting_beats_it(found: tuple[list[int], list[float]]) -> None:
    curves = curve(*found)
    assert (np.diff(curves.quality_RS) >= 0).all() and (np.diff(curves.log2_bytes_RS) >= 0).all()
    for size, quality in zip(*found, strict=True):
        assert bytes_at(curves, np.array([[quality]]))[0, 0] <= size * (1 + 1e-12)


def cubic(ours: tuple[list[float], list[float]], theirs: tuple[list[float], list[float]]) -> float:
    """VCEG-M33 as published: cubic polynomials of log-rate over quality."""
    fits = [np.polyint(np.polyfit(quality, np.log(sizes), 3)) for sizes, quality in (ours, theirs)]
    low, high = max(min(ours[1]), min(theirs[1])), min(max(ours[1]), max(theirs[1]))
    areas = [np.polyval(fit, high) - np.polyval(fit, low) for fit in fits]
    return float(np.exp((areas[0] - areas[1]) / (high - low)) - 1)


def test_smooth_curves_agree_with_the_classical_cubic_fit() -> None:
    found = bd_rate(curve(*CLASSIC), curve(*CLASSIC_REFERENCE))[0]
    assert found == pytest.approx(cubic(CLASSIC, CLASSIC_REFERENCE), abs=0.005)
    assert found == pytest.approx(-0.25, abs=0.03)


def test_a_value_by_hand() -> None:
    """Doubling bytes over ten points against one doubling over twenty: half a doubling dearer in the mean."""
    ours, theirs = curve([100, 200], [70, 80]), curve([100, 200], [70, 90])
    low_R, high_R = shared_quality(ours, theirs)
    assert (low_R[0], high_R[0]) == (70, 80)
    assert bd_rate(ours, theirs)[0] == pytest.approx(2**0.25 - 1)  # log2: mean 0.5 against mean 0.25


@pytest.mark.parametrize("quality", [[80, 90], [90, 95], [40, 60], [70, 70], [70, 65]])
def test_without_a_range_of_shared_quality_there_is_no_figure(quality: list[float]) -> None:
    assert np.isnan(bd_rate(curve([100, 200], quality), curve([100, 200], [60, 80]))[0])


def test_the_bound_charges_the_cheapest_setting_for_all_that_is_worse() -> None:
    theirs = curve([400, 1600], [60, 80])  # 800 in the geometric mean
    above = bd_rate_at_most(curve([100, 200], [85, 95]), theirs)[0]
    assert above == pytest.approx(100 / 800 - 1)
    assert bd_rate_at_most(curve([100], [80]), theirs)[0] == pytest.approx(above)
    half = bd_rate_at_most(curve([100, 400], [70, 80]), theirs)[0]
    assert half == pytest.approx(100 * 2**0.5 / 800 - 1)  # 100 B over one half, 100 to 400 over the other


@pytest.mark.parametrize("quality", [[40, 60], [50, 55], [60, 60]])
def test_there_is_no_bound_for_what_does_not_reach_the_others_worst(quality: list[float]) -> None:
    assert np.isnan(bd_rate_at_most(curve([100, 200], quality), curve([100, 200], [60, 80]))[0])


@given(settings(), settings())
def test_where_ours_starts_no_higher_the_bound_is_the_figure(
    found: tuple[list[int], list[float]], other: tuple[list[int], list[float]]
) -> None:
    ours, theirs = curve(*found), curve(*other)
    np.testing.assert_allclose(bd_rate_at_most(ours, theirs), bd_rate(ours, theirs))


def test_bytes_at_a_quality() -> None:
    curves = curve([400, 100, 300, 200], [90, 70, 75, 80])  # 300 B for 75 % is dominated
    wanted = np.array([[60, 70, 75, 80, 85, 90, 91]])
    found = bytes_at(curves, wanted)[0]
    np.testing.assert_allclose(found[:6], [100, 100, 100 * 2**0.5, 200, 200 * 2**0.5, 400])
    assert np.isnan(found[6])


def test_rows_are_independent() -> None:
    rng = np.random.default_rng(3)
    sizes_RS, quality_RS = rng.uniform(100, 5000, (50, 6)), rng.uniform(60, 90, (50, 6))
    reference_RS = (rng.uniform(100, 5000, (50, 4)), rng.uniform(60, 90, (50, 4)))
    together = bd_rate(envelope(sizes_RS, quality_RS), envelope(*reference_RS))
    apart = [
        bd_rate(curve(*row[:2]), curve(*row[2:]))[0] for row in zip(sizes_RS, quality_RS, *reference_RS, strict=True)
    ]
    np.testing.assert_array_equal(together, apart)
    assert 0 < np.isnan(together).sum() < 50


def test_weights_are_the_sample_and_draws_of_its_size() -> None:
    weights_RN = resampling_weights(40, 500)
    np.testing.assert_allclose(weights_RN.sum(1), 1)
    np.testing.assert_array_equal(weights_RN[0], np.full(40, 1 / 40))
    np.testing.assert_allclose(40 * weights_RN, np.rint(40 * weights_RN), atol=1e-9)
    np.testing.assert_array_equal(weights_RN, resampling_weights(40, 500))
    spread = (weights_RN[1:] @ (np.arange(40) < 20)).std()
    assert spread == pytest.approx((0.25 / 40) ** 0.5, rel=0.1)


def noisy(rng: np.random.Generator, quality_S: Floats, photos: int) -> Floats:
    return (rng.random((len(quality_S), photos)) < quality_S[:, None]).astype(float)


def test_the_interval_covers_the_truth() -> None:
    """Two methods that differ by a factor of 0.6 in bytes, measured on 400 photos again and again."""
    rng, covered = np.random.default_rng(1), 0
    sizes_S, quality_S = np.array([100.0, 200, 400, 800]), np.array([0.6, 0.7, 0.8, 0.9])
    for trial in range(40):
        weights_RN = resampling_weights(400, 300, seed=trial)
        ours, theirs = (100 * weights_RN @ noisy(rng, quality_S, 400).T for _ in range(2))
        sizes_RS = np.broadcast_to(sizes_S, ours.shape)
        found = estimate(bd_rate(envelope(0.6 * sizes_RS, ours), envelope(sizes_RS, theirs)))
        assert found.value is not None and found.low is not None and found.high is not None
        assert found.low <= found.value <= found.high and found.undefined == 0
        covered += found.low <= -0.4 <= found.high
    assert covered >= 33


def test_undefined_resamples_are_counted() -> None:
    found = estimate(np.array([0.5, np.nan, 0.1, np.nan, 0.3]))
    assert found.value == 0.5 and found.undefined == 0.5
    assert found.low == pytest.approx(0.105) and found.high == pytest.approx(0.295)
    nothing = estimate(np.full(5, np.nan))
    assert (nothing.value, nothing.low, nothing.high, nothing.undefined) == (None, None, None, 1.0)
